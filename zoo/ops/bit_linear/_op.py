"""BitLinear as operators of torch: ``zoo::bit_linear``, ``zoo::bit_linear_backward`` and ``zoo::packed_bit_linear``.

Registered with fake tensors and autograd, so that torch.compile and torch.export take them as they are. What runs
inside is chosen when it runs. The arithmetic is in float32, or float64 where ``x`` is. For the backward pass nothing
but the inputs is kept: what is quantised is quantised again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ShapeError
from zoo.ops._checks import cast, check_tensors, compute_dtype, show
from zoo.ops.bit_linear import vectorised
from zoo.ops.bit_linear._dispatch import choose

MAX_INPUTS = 2**17


def check(x: Tensor, weight: Tensor, norm_weight: Tensor) -> None:
    """Raise ShapeError for what :func:`~zoo.ops.bit_linear.bit_linear` says it cannot take."""
    if weight.ndim != 2:
        raise ShapeError(f"weight has shape {show(weight)}; expected [Cout, Cin].")
    _check_input(x, norm_weight, weight.shape[1])
    check_tensors("bit_linear", x.device, x=x, weight=weight, norm_weight=norm_weight)


def check_packed(x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int) -> None:
    """Raise ShapeError for what :func:`~zoo.ops.bit_linear.packed_bit_linear` says it cannot take."""
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[0] != -(-out_features // 4):
        rows = -(-out_features // 4)
        raise ShapeError(
            f"packed is {packed.dtype} of shape {show(packed)}; expected torch.uint8 [{rows}, Cin] for {out_features} "
            "outputs."
        )
    if scale.numel() != 1:
        raise ShapeError(f"scale has shape {show(scale)}; expected one number.")
    _check_input(x, norm_weight, packed.shape[1])
    check_tensors("packed_bit_linear", x.device, x=x, scale=scale, norm_weight=norm_weight)
    if packed.device != x.device:
        raise ShapeError(f"packed is on {packed.device} and x on {x.device}; expected one device.")


def check_inputs(columns: int) -> None:
    """Raise ShapeError where sums of so many products of int8 and ternary numbers might not be exact."""
    if columns > MAX_INPUTS:
        raise ShapeError(f"The weight has {columns} inputs; expected at most {MAX_INPUTS}, up to which sums are exact.")


def _check_input(x: Tensor, norm_weight: Tensor, columns: int) -> None:
    check_inputs(columns)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ShapeError(f"x has shape {show(x)}; expected [..., {columns}].")
    if norm_weight.ndim != 1 or len(norm_weight) != columns:
        raise ShapeError(f"norm_weight has shape {show(norm_weight)}; expected [{columns}].")


@torch.library.custom_op("zoo::bit_linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """``[..., Cin] -> [..., Cout]`` in the dtype of x."""
    check(x, weight, norm_weight)
    if x.numel() == 0 or len(weight) == 0:
        return x.new_zeros(*x.shape[:-1], len(weight))
    dtype = compute_dtype(x)
    run = choose(x.device, dtype).module.forward
    return run(*cast(dtype, x, weight, norm_weight), eps).to(x.dtype).contiguous()


@linear.register_fake
def _(x: Any, weight: Any, norm_weight: Any, eps: float) -> Any:
    check(x, weight, norm_weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("zoo::bit_linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, weight_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (empty if not asked for) and norm_weight, each in the dtype of its tensor."""
    inputs = (x, weight, norm_weight)
    if x.numel() == 0 or len(weight) == 0:
        gradients: Any = [torch.zeros_like(each) for each in inputs]
    else:
        grad, x_, weight_, norm_ = cast(compute_dtype(x), grad.contiguous(), *inputs)
        gradients = vectorised.backward(grad, x_, weight_, norm_, eps, weight_too=weight_too)
    grad_x, grad_weight, grad_norm = gradients
    return (
        grad_x.to(x.dtype).contiguous(),
        grad_weight.to(weight.dtype).contiguous() if weight_too else weight.new_empty(0),
        grad_norm.to(norm_weight.dtype).contiguous(),
    )


@linear_backward.register_fake
def _(grad: Any, x: Any, weight: Any, norm_weight: Any, eps: float, weight_too: bool) -> Any:
    def like(each: Any) -> Any:
        return torch.empty_like(each, memory_format=torch.contiguous_format)

    return like(x), like(weight) if weight_too else weight.new_empty(0), like(norm_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight_too = ctx.needs_input_grad[1]
    grad_x, grad_weight, grad_norm = linear_backward(grad, *ctx.saved_tensors, ctx.eps, weight_too)
    return grad_x, grad_weight if weight_too else None, grad_norm, None


linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("zoo::packed_bit_linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float
) -> Tensor:
    """``[..., Cin] -> [..., Cout]`` in the dtype of x; there are no gradients."""
    check_packed(x, packed, scale, norm_weight, out_features)
    return run_packed(x, packed, scale, norm_weight, out_features, eps)


def run_packed(x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float) -> Tensor:
    """What is inside the operator, for plain inference, where the operator itself would take most of the time."""
    dtype = compute_dtype(x)
    if x.numel() == 0 or out_features == 0:
        return x.new_zeros(*x.shape[:-1], out_features)
    run = choose(x.device, dtype).module.packed_forward
    x_, scale, norm_weight = cast(dtype, x, scale, norm_weight)
    out = run(x_, packed, scale, norm_weight, out_features, eps)
    return out if out.dtype == x.dtype and out.is_contiguous() else out.to(x.dtype).contiguous()


@packed_linear.register_fake
def _(x: Any, packed: Any, scale: Any, norm_weight: Any, out_features: int, eps: float) -> Any:
    check_packed(x, packed, scale, norm_weight, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


@register_flop_formula(torch.ops.zoo.bit_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """As a linear layer's: the additions that it is made of are not counted differently."""
    return 2 * weight[0] * x.numel()


@register_flop_formula(torch.ops.zoo.packed_bit_linear)
def _packed_flops(
    x: torch.Size, packed: torch.Size, scale: torch.Size, norm: torch.Size, out_features: int, *_: Any, **__: Any
) -> int:
    return 2 * out_features * x.numel()
