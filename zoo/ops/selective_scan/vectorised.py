"""The selective scan in PyTorch operators over whole stretches of time: for any device, and the form that is exported.

To bound memory, which holds every state of a stretch, long sequences go one chunk after the other.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._linear_scan import linear_scan

CHUNK = 256  # steps
EXPORTED_CHUNK = 4096  # a graph has the operators of every chunk, and takes longer to convert than in proportion


def _scan_from(state: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """:func:`linear_scan` from ``state``, which has no last dimension."""
    first = b[..., :1] + a[..., :1] * state[..., None]
    return linear_scan(a, torch.cat((first, b[..., 1:]), -1))


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Step sizes before and after softplus."""
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    return raw, F.softplus(raw) if delta_softplus else raw


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As :func:`~zoo.ops.selective_scan.reference.selective_scan_reference`."""
    groups, length = B.shape[1], u.shape[2]
    _, dt = _step_sizes(delta, delta_bias, delta_softplus)
    # Channels by group: u, delta [B, G, K, L]; A [G, K, N]; states [B, G, K, N, T]
    dt, x = dt.unflatten(1, (groups, -1)), (dt * u).unflatten(1, (groups, -1))
    A = A.unflatten(0, (groups, -1))
    state = x.new_zeros(()).expand(*x.shape[:3], A.shape[-1])
    outputs = []
    for start in range(0, length, chunk):
        t = slice(start, start + chunk)
        decay = torch.exp(dt[:, :, :, None, t] * A[..., None])
        states = _scan_from(state, decay, x[:, :, :, None, t] * B[:, :, None, :, t])
        outputs.append((states * C[:, :, None, :, t]).sum(-2))
        state = states[..., -1]
    y = torch.cat(outputs, -1).flatten(1, 2)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, state.flatten(1, 2)


exported = partial(forward, chunk=EXPORTED_CHUNK)


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
    delta_softplus: bool,
    chunk: int = CHUNK,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, None for those that are not there.

    The gradient ``g[t]`` of the state after step t obeys a recurrence of the same kind in reversed time,
    ``g[t] = dy[t] C[t] + decay[t+1] g[t+1]``. States are recomputed chunk by chunk from those at the chunks' starts.
    """
    groups, length = B.shape[1], u.shape[2]
    raw, dt = _step_sizes(delta, delta_bias, delta_softplus)
    grad_scan = grad_y if z is None else grad_y * F.silu(z)  # of y before the gate

    dt_g, u_g, dy = (each.unflatten(1, (groups, -1)) for each in (dt, u, grad_scan))  # [B, G, K, L]
    x = dt_g * u_g
    A_g = A.unflatten(0, (groups, -1))  # [G, K, N]

    def decay_and_input(t: slice) -> tuple[Tensor, Tensor]:
        return torch.exp(dt_g[:, :, :, None, t] * A_g[..., None]), x[:, :, :, None, t] * B[:, :, None, :, t]

    chunks = [slice(start, start + chunk) for start in range(0, length, chunk)]
    starts = [x.new_zeros(*x.shape[:3], A.shape[-1])]
    for t in chunks[:-1]:
        starts.append(_scan_from(starts[-1], *decay_and_input(t))[..., -1])

    grad_x, grad_dt, grad_B, grad_C, scanned = ([] for _ in range(5))  # by chunk, last first
    grad_A = torch.zeros_like(A_g)
    carry = torch.zeros_like(starts[0])  # gradient of the state after the chunk, from later steps
    if grad_last_state is not None:
        carry = grad_last_state.unflatten(1, (groups, -1))
    for t, start in zip(reversed(chunks), reversed(starts), strict=True):
        decay, scan_input = decay_and_input(t)
        states = _scan_from(start, decay, scan_input)
        earlier = torch.cat((start[..., None], states[..., :-1]), -1)
        direct = dy[:, :, :, None, t] * C[:, :, None, :, t]
        direct = torch.cat((direct[..., :-1], direct[..., -1:] + carry[..., None]), -1)
        later_decay = F.pad(decay[..., 1:], (0, 1))
        g = linear_scan(later_decay.flip(-1), direct.flip(-1)).flip(-1)
        g_decayed = g * decay
        carry = g_decayed[..., 0]
        exponent = g_decayed * earlier  # gradient of dt * A
        grad_A = grad_A + (exponent * dt_g[:, :, :, None, t]).sum((0, -1))
        grad_dt.append((exponent * A_g[..., None]).sum(-2))
        grad_x.append((g * B[:, :, None, :, t]).sum(-2))
        grad_B.append((g * x[:, :, :, None, t]).sum(2))
        grad_C.append((states * dy[:, :, :, None, t]).sum(2))
        if z is not None:
            scanned.append((states * C[:, :, None, :, t]).sum(-2))

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts[::-1], -1)

    dx = joined(grad_x).flatten(1, 2)
    grad_u = dx * dt if D is None else dx * dt + D[:, None] * grad_scan
    grad_delta = joined(grad_dt).flatten(1, 2) + dx * u
    if delta_softplus:
        grad_delta = grad_delta * raw.sigmoid()
    grad_z = None
    if z is not None:
        y = joined(scanned).flatten(1, 2)
        y = y if D is None else y + D[:, None] * u
        gate = z.sigmoid()
        grad_z = grad_y * y * gate * (1 + z * (1 - gate))
    grad_D = None if D is None else (grad_scan * u).sum((0, 2))
    grad_bias = None if delta_bias is None else grad_delta.sum((0, 2))
    return grad_u, grad_delta, grad_A.flatten(0, 1), joined(grad_B), joined(grad_C), grad_D, grad_z, grad_bias
