"""The gated recurrence in Triton, forward and backward, for CUDA GPUs; float32.

One program walks ``D`` columns of one sequence through time, in tiles of ``T`` steps. Within a tile time is an
associative scan, across tiles the state is carried.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, it runs on the CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Steps and columns of a tile, and what the compiler is told; measured on an H200.
TILE: dict[str, int] = {"T": 128, "D": 16, "num_warps": 4}

# The kernels' arguments are pointers and numbers that Triton types itself.
# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _combine(a_left, b_left, a_right, b_right):
    """``h -> a h + b``, left before right, as one step."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _forward_kernel(
    f, v, initial_state, states, length, width, HAS_STATE: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * D + tl.arange(0, D)
    real = column < width
    step = tl.arange(0, T)
    state = tl.zeros([D], tl.float32)
    if HAS_STATE:
        state = tl.load(initial_state + sequence * width + column, mask=real, other=0.0)
    for start in range(0, length, T):
        t = start + step
        at = (sequence * length + t[:, None]) * width + column[None, :]
        inside = (t < length)[:, None] & real[None, :]
        a = tl.load(f + at, mask=inside, other=0.0)
        b = tl.load(v + at, mask=inside, other=0.0)
        b += tl.where(step[:, None] == 0, a * state[None, :], 0.0)
        _, h = tl.associative_scan((a, b), 0, _combine)
        tl.store(states + at, h, mask=inside)
        state = tl.sum(tl.where(step[:, None] == T - 1, h, 0.0), 0)


@triton.jit
def _backward_kernel(
    grad, f, states, initial_state, grad_f, grad_v, length, width, tiles,
    HAS_STATE: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * D + tl.arange(0, D)
    real = column < width
    step = tl.arange(0, T)
    start = tl.zeros([D], tl.float32)
    if HAS_STATE:
        start = tl.load(initial_state + sequence * width + column, mask=real, other=0.0)
    carry = tl.zeros([D], tl.float32)  # gradient of the state after the tile, from later steps
    for i in range(0, tiles):
        t = (tiles - 1 - i) * T + step
        at = (sequence * length + t[:, None]) * width + column[None, :]
        inside = (t < length)[:, None] & real[None, :]
        decay = tl.load(f + at, mask=inside, other=0.0)
        # g[t] = grad[t] + f[t+1] g[t+1]
        later = tl.load(f + at + width, mask=(t + 1 < length)[:, None] & real[None, :], other=0.0)
        g = tl.load(grad + at, mask=inside, other=0.0)
        g += tl.where(step[:, None] == T - 1, carry[None, :], 0.0)
        _, g = tl.associative_scan((later, g), 0, _combine, reverse=True)
        carry = tl.sum(tl.where(step[:, None] == 0, decay * g, 0.0), 0)
        before = tl.load(states + at - width, mask=inside & (t > 0)[:, None], other=0.0)
        before += tl.where((t == 0)[:, None], start[None, :], 0.0)
        tl.store(grad_v + at, g, mask=inside)
        tl.store(grad_f + at, g * before, mask=inside)


def forward(f: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """As :func:`zoo.ops.hgrn_scan.vectorised.forward`."""
    batch, length, width = v.shape
    states = torch.empty_like(v, memory_format=torch.contiguous_format)
    _forward_kernel[(batch, triton.cdiv(width, TILE["D"]))](
        f.contiguous(),
        v.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        states,
        length,
        width,
        HAS_STATE=initial_state is not None,
        **TILE,
    )
    return states


def backward(grad: Tensor, f: Tensor, states: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.hgrn_scan.vectorised.backward`."""
    batch, length, width = f.shape
    grad_f, grad_v = (torch.empty_like(f, memory_format=torch.contiguous_format) for _ in range(2))
    _backward_kernel[(batch, triton.cdiv(width, TILE["D"]))](
        grad.contiguous(),
        f.contiguous(),
        states.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        grad_f,
        grad_v,
        length,
        width,
        triton.cdiv(length, TILE["T"]),
        HAS_STATE=initial_state is not None,
        **TILE,
    )
    return grad_f, grad_v
