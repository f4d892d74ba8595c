"""The selective scan in Triton, forward and backward, for CUDA GPUs; float32.

One program walks one channel of one batch entry through time, in tiles of ``T`` steps by ``N`` states. Within a tile
time is an associative scan, across tiles the state is carried. The backward kernel first stores the state at the start
of each tile, then goes through the tiles in reverse, recomputing their states. Channels of a group add up their
gradients of B and C atomically.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, it runs on the CPU, slowly, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Steps of a tile, and warps of a program; measured on an H200. Few programs do more at a time, many less.
FEW_PROGRAMS = 4096
FORWARD_FEW, FORWARD_MANY, BACKWARD = (128, 4), (32, 1), (64, 4)


# The kernels' arguments are pointers and numbers that Triton types itself.
# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _combine(a_left, b_left, a_right, b_right):
    """``h -> a h + b``, left before right, as one step."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _step_sizes(delta, row, bias, t, length, SOFTPLUS: tl.constexpr):
    """Step sizes before and after softplus; 0 outside the sequence, where the state then stays as it is."""
    raw = tl.load(delta + row * length + t, mask=t < length, other=0.0) + bias
    dt = _softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(t < length, dt, 0.0)


@triton.jit
def _forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, y, last_state, length, channels, channels_per_group, states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # batch entry * channels + channel
    channel = row % channels
    group_row = row // channels * (channels // channels_per_group) + channel // channels_per_group
    n, step = tl.arange(0, N), tl.arange(0, T)
    a = tl.load(A + channel * states + n, mask=n < states, other=0.0)
    bias = tl.load(delta_bias + channel) if HAS_BIAS else 0.0
    state = tl.zeros([N], tl.float32)
    for start in range(0, length, T):
        t = start + step
        inside = t < length
        maps = (group_row * states + n[:, None]) * length + t[None, :]
        maps_inside = (n[:, None] < states) & inside[None, :]
        x = tl.load(u + row * length + t, mask=inside, other=0.0)
        _, dt = _step_sizes(delta, row, bias, t, length, SOFTPLUS)
        decay = tl.exp(a[:, None] * dt[None, :])
        h = (dt * x)[None, :] * tl.load(B + maps, mask=maps_inside, other=0.0)
        h += tl.where(step[None, :] == 0, decay * state[:, None], 0.0)
        _, h = tl.associative_scan((decay, h), 1, _combine)
        state = tl.sum(tl.where(step[None, :] == T - 1, h, 0.0), 1)
        out = tl.sum(h * tl.load(C + maps, mask=maps_inside, other=0.0), 0)
        if HAS_D:
            out += tl.load(D + channel) * x
        if HAS_Z:
            gate = tl.load(z + row * length + t, mask=inside, other=0.0)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + row * length + t, out, mask=inside)
    tl.store(last_state + row * states + n, state, mask=n < states)


@triton.jit
def _backward_kernel(
    grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, starts,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias,
    length, channels, channels_per_group, states, tiles,
    HAS_STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    group_row = row // channels * (channels // channels_per_group) + channel // channels_per_group
    n, step = tl.arange(0, N), tl.arange(0, T)
    real = n < states
    a = tl.load(A + channel * states + n, mask=real, other=0.0)
    bias = tl.load(delta_bias + channel) if HAS_BIAS else 0.0
    skip = tl.load(D + channel) if HAS_D else 0.0

    state = tl.zeros([N], tl.float32)
    for tile in range(0, tiles):
        tl.store(starts + (row * tiles + tile) * N + n, state)
        t = tile * T + step
        inside = t < length
        maps = (group_row * states + n[:, None]) * length + t[None, :]
        x = tl.load(u + row * length + t, mask=inside, other=0.0)
        _, dt = _step_sizes(delta, row, bias, t, length, SOFTPLUS)
        decay = tl.exp(a[:, None] * dt[None, :])
        h = (dt * x)[None, :] * tl.load(B + maps, mask=real[:, None] & inside[None, :], other=0.0)
        h += tl.where(step[None, :] == 0, decay * state[:, None], 0.0)
        _, h = tl.associative_scan((decay, h), 1, _combine)
        state = tl.sum(tl.where(step[None, :] == T - 1, h, 0.0), 1)
    tl.debug_barrier()  # the starts are read by other threads than wrote them

    carry = tl.zeros([N], tl.float32)  # gradient of the state after the tile, from later steps
    if HAS_STATE:
        carry = tl.load(grad_last_state + row * states + n, mask=real, other=0.0)
    sum_A = tl.zeros([N], tl.float32)
    sum_D = tl.zeros([T], tl.float32)
    sum_bias = tl.zeros([T], tl.float32)
    for i in range(0, tiles):
        tile = tiles - 1 - i
        t = tile * T + step
        inside = t < length
        maps = (group_row * states + n[:, None]) * length + t[None, :]
        maps_inside = real[:, None] & inside[None, :]
        state = tl.load(starts + (row * tiles + tile) * N + n)
        x = tl.load(u + row * length + t, mask=inside, other=0.0)
        dy = tl.load(grad_y + row * length + t, mask=inside, other=0.0)
        raw, dt = _step_sizes(delta, row, bias, t, length, SOFTPLUS)
        b = tl.load(B + maps, mask=maps_inside, other=0.0)
        c = tl.load(C + maps, mask=maps_inside, other=0.0)
        decay = tl.exp(a[:, None] * dt[None, :])
        own = (dt * x)[None, :] * b
        h = own + tl.where(step[None, :] == 0, decay * state[:, None], 0.0)
        _, h = tl.associative_scan((decay, h), 1, _combine)
        if HAS_Z:
            gate = tl.load(z + row * length + t, mask=inside, other=0.0)
            s = tl.sigmoid(gate)
            out = tl.sum(h * c, 0) + skip * x
            tl.store(grad_z + row * length + t, dy * out * s * (1.0 + gate * (1.0 - s)), mask=inside)
            dy *= gate * s
        # g[t] = dy[t] c[t] + decay[t+1] g[t+1]
        _, later_dt = _step_sizes(delta, row, bias, t + 1, length, SOFTPLUS)
        later_decay = tl.exp(a[:, None] * later_dt[None, :])
        g = dy[None, :] * c + tl.where(step[None, :] == T - 1, carry[:, None], 0.0)
        _, g = tl.associative_scan((later_decay, g), 1, _combine, reverse=True)
        carry = tl.sum(tl.where(step[None, :] == 0, decay * g, 0.0), 1)
        exponent = g * (h - own)  # gradient of dt * a
        dx = tl.sum(g * b, 0)
        d = tl.sum(exponent * a[:, None], 0) + dx * x
        if SOFTPLUS:
            d *= tl.sigmoid(raw)
        d = tl.where(inside, d, 0.0)
        tl.store(grad_delta + row * length + t, d, mask=inside)
        tl.store(grad_u + row * length + t, dx * dt + skip * dy, mask=inside)
        tl.atomic_add(grad_B + maps, g * (dt * x)[None, :], mask=maps_inside)
        tl.atomic_add(grad_C + maps, h * dy[None, :], mask=maps_inside)
        sum_A += tl.sum(exponent * dt[None, :], 1)
        sum_D += dy * x
        sum_bias += d
    tl.atomic_add(grad_A + channel * states + n, sum_A, mask=real)
    if HAS_D:
        tl.atomic_add(grad_D + channel, tl.sum(sum_D, 0))
    if HAS_BIAS:
        tl.atomic_add(grad_bias + channel, tl.sum(sum_bias, 0))


def _settings(
    tile: tuple[int, int],
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> dict[str, Any]:
    steps, warps = tile
    return {
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": delta_bias is not None,
        "SOFTPLUS": delta_softplus,
        "N": triton.next_power_of_2(A.shape[1]),
        "T": steps,
        "num_warps": warps,
    }


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.selective_scan.vectorised.forward`."""
    batch, channels, length = u.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last_state = u.new_empty(batch, channels, A.shape[1])
    tile = FORWARD_FEW if batch * channels < FEW_PROGRAMS else FORWARD_MANY
    _forward_kernel[(batch * channels,)](
        *_contiguous(u, delta, A, B, C, D, z, delta_bias),
        y,
        last_state,
        length,
        channels,
        channels // B.shape[1],
        A.shape[1],
        **_settings(tile, A, D, z, delta_bias, delta_softplus),
    )
    return y, last_state


def backward(
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
    *,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """As :func:`zoo.ops.selective_scan.vectorised.backward`."""
    batch, channels, length = u.shape
    tiles = triton.cdiv(length, BACKWARD[0])
    settings = _settings(BACKWARD, A, D, z, delta_bias, delta_softplus)
    starts = u.new_empty(batch * channels, tiles, settings["N"])

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)

    grads = [like(x) for x in (u, delta, A, B, C, D, z, delta_bias)]
    _backward_kernel[(batch * channels,)](
        *_contiguous(grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias),
        starts,
        *grads,
        length,
        channels,
        channels // B.shape[1],
        A.shape[1],
        tiles,
        HAS_STATE=grad_last_state is not None,
        **settings,
    )
    return tuple(grads)
