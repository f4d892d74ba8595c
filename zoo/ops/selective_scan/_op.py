"""The selective scan as operators of torch: ``zoo::selective_scan`` and ``zoo::selective_scan_backward``.

Registered with fake tensors and autograd, so that torch.compile and torch.export take them as they are. What runs
inside is chosen when it runs. The arithmetic is in float32, or float64 where ``u`` is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ShapeError
from zoo.ops._checks import cast, check_tensors, compute_dtype, show
from zoo.ops.selective_scan._dispatch import choose

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ShapeError for what :func:`~zoo.ops.selective_scan.selective_scan` says it cannot take."""
    if u.ndim != 3:
        raise ShapeError(f"u has shape {show(u)}; expected [B, D, L].")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ShapeError(f"A has shape {show(A)}; expected [D, N] with D = {channels} and at least one state.")
    states = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        if x.ndim != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, states, length):
            raise ShapeError(
                f"{name} has shape {show(x)}; expected [B, N, L] or [B, G, N, L] with B = {batch}, N = {states}, "
                f"L = {length}."
            )
    groups = B.shape[1]
    if C.shape[1] != groups:
        raise ShapeError(f"B has {groups} groups and C has {C.shape[1]}; expected as many in each.")
    if groups == 0 or channels % groups:
        raise ShapeError(f"B and C have {groups} groups, which do not divide the {channels} channels of u.")
    others: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("delta", delta, (batch, channels, length)),
        ("D", D, (channels,)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (channels,)),
    )
    for name, other, expected in others:
        if other is not None and tuple(other.shape) != expected:
            raise ShapeError(f"{name} has shape {show(other)}; expected {list(expected)}.")
    check_tensors("selective_scan", u.device, **dict(zip(NAMES, (u, delta, A, B, C, D, z, delta_bias), strict=True)))


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y in the dtype of u, and the state after the last step in float32 (float64 where u is); B and C have groups."""
    check(u, delta, A, B, C, D, z, delta_bias)
    dtype = compute_dtype(u)
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format), _no_state(u, A)
    run = choose(u.device, dtype).module.forward
    y, last_state = run(*cast(dtype, u, delta, A, B, C, D, z, delta_bias), delta_softplus=delta_softplus)
    return y.to(u.dtype).contiguous(), last_state.contiguous()


def _no_state(u: Tensor, A: Tensor) -> Tensor:
    return u.new_zeros((*u.shape[:2], A.shape[1]), dtype=compute_dtype(u))


@scan.register_fake
def _(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: Any) -> Any:
    check(u, delta, A, B, C, D, z, delta_bias)
    return torch.empty_like(u, memory_format=torch.contiguous_format), _no_state(u, A)


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def scan_backward(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight tensors, each in the dtype of its tensor; empty ones for tensors that are not there."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    dtype = compute_dtype(u)
    if u.numel() == 0:
        return tuple(u.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs)  # type: ignore[return-value]
    run = choose(u.device, dtype).module.backward
    gradients = run(*cast(dtype, grad_y, grad_last_state, *inputs), delta_softplus=delta_softplus)
    return tuple(  # type: ignore[return-value]
        u.new_empty(0) if x is None else gradient.to(x.dtype).contiguous()
        for x, gradient in zip(inputs, gradients, strict=True)
    )


@scan_backward.register_fake
def _(grad_y: Any, grad_last_state: Any, *inputs: Any) -> Any:
    u = inputs[0]
    return tuple(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs[: len(NAMES)]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = scan_backward(grad_y, grad_last_state, *tensors, ctx.delta_softplus)
    return *(None if x is None else gradient for x, gradient in zip(tensors, gradients, strict=True)), None


scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.selective_scan)
def _flops(u: torch.Size, delta: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    """As EfficientVMamba and VMamba v1 count: 9 multiply-accumulates for each state and step, 1 for the skip."""
    batch, channels, length = u
    return 2 * (9 * A[1] + 1) * batch * channels * length
