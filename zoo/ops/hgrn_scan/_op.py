"""The gated recurrence as operators of torch: ``zoo::hgrn_scan`` and ``zoo::hgrn_scan_backward``.

Registered with fake tensors and autograd, so that torch.compile and torch.export take them as they are. What runs
inside is chosen when it runs. The arithmetic is in float32, or float64 where ``v`` is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ShapeError
from zoo.ops._checks import cast, check_tensors, compute_dtype, show
from zoo.ops.hgrn_scan._dispatch import choose


def check(f: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    """Raise ShapeError for what :func:`~zoo.ops.hgrn_scan.hgrn_scan` says it cannot take."""
    if v.ndim != 3:
        raise ShapeError(f"v has shape {show(v)}; expected [B, T, D].")
    if f.shape != v.shape:
        raise ShapeError(f"f has shape {show(f)}; expected that of v, {show(v)}.")
    batch, _, width = v.shape
    if initial_state is not None and tuple(initial_state.shape) != (batch, width):
        raise ShapeError(f"initial_state has shape {show(initial_state)}; expected [B, D], here {[batch, width]}.")
    check_tensors("hgrn_scan", v.device, v=v, f=f, initial_state=initial_state)


@torch.library.custom_op("zoo::hgrn_scan", mutates_args=())
def scan(f: Tensor, v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States in the dtype of v, and the last one in float32 (float64 where v is)."""
    check(f, v, initial_state)
    dtype = compute_dtype(v)
    f, v_, initial_state = cast(dtype, f, v, initial_state)
    if v.numel() == 0:
        last_state = v_.new_zeros(len(v), v.shape[2]) if initial_state is None else initial_state.clone()
        return torch.empty_like(v, memory_format=torch.contiguous_format), last_state.contiguous()
    states = choose(v.device, dtype).module.forward(f, v_, initial_state)
    last_state = states[:, -1].clone(memory_format=torch.contiguous_format)
    return states.to(v.dtype).contiguous(), last_state


@scan.register_fake
def _(f: Any, v: Any, initial_state: Any) -> Any:
    check(f, v, initial_state)
    states = torch.empty_like(v, memory_format=torch.contiguous_format)
    return states, v.new_empty((v.shape[0], v.shape[2]), dtype=compute_dtype(v))


@torch.library.custom_op("zoo::hgrn_scan_backward", mutates_args=())
def scan_backward(
    grad_states: Tensor | None,
    grad_last_state: Tensor | None,
    f: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of f, v and the initial state, each in the dtype of its tensor; that of v is the states'.

    The third is empty where there is no initial state.
    """
    dtype = compute_dtype(states)
    grad, last, f_, states_, start = cast(dtype, grad_states, grad_last_state, f, states, initial_state)
    if states.numel() == 0:
        passed = f.new_empty(0) if initial_state is None else torch.zeros_like(initial_state)
        passed = passed if last is None or initial_state is None else passed + last
        return torch.zeros_like(f), torch.zeros_like(states), passed.to(f.dtype if start is None else passed.dtype)
    if grad is None:
        grad = torch.zeros_like(states_)
    if last is not None:
        grad = torch.cat((grad[:, :-1], grad[:, -1:] + last[:, None]), 1)
    grad_f, grad_v = choose(states.device, dtype).module.backward(grad, f_, states_, start)
    grad_start = f.new_empty(0)
    if initial_state is not None:
        grad_start = (f_[:, 0] * grad_v[:, 0]).to(initial_state.dtype)
    return grad_f.to(f.dtype).contiguous(), grad_v.to(states.dtype).contiguous(), grad_start


@scan_backward.register_fake
def _(grad_states: Any, grad_last_state: Any, f: Any, states: Any, initial_state: Any) -> Any:
    def like(x: Any) -> Any:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(f), like(states), f.new_empty(0) if initial_state is None else like(initial_state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    f, _, initial_state = inputs
    # The states and not v: what follows keeps them anyway. In half precision they are the rounded ones.
    ctx.save_for_backward(f, output[0], initial_state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_states: Tensor | None, grad_last_state: Tensor | None) -> tuple[Tensor | None, ...]:
    f, states, initial_state = ctx.saved_tensors
    grad_f, grad_v, grad_start = scan_backward(grad_states, grad_last_state, f, states, initial_state)
    return grad_f, grad_v, None if initial_state is None else grad_start


scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.hgrn_scan)
def _flops(f: torch.Size, *_: Any, **__: Any) -> int:
    """One multiply-accumulate for each element."""
    return 2 * f[0] * f[1] * f[2]
