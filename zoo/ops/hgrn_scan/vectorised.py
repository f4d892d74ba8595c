"""The gated recurrence in PyTorch operators over whole sequences: for any device, and the form that is exported."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._linear_scan import linear_scan


def forward(f: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state after each step, ``[B, T, D]``; T is at least 1."""
    if initial_state is not None:
        first = v[:, :1] + f[:, :1] * initial_state[:, None]
        v = torch.cat((first, v[:, 1:]), 1)
    return linear_scan(f, v, -2)


def backward(grad: Tensor, f: Tensor, states: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of f and v, from that of the states, with what comes through the last one already added to it.

    The gradient of v is ``g[t] = grad[t] + f[t+1] g[t+1]``, a recurrence of the same kind in reversed time, that of f
    is ``g[t] s[t-1]``, and that of the initial state ``f[0] g[0]``.
    """
    later = F.pad(f[:, 1:], (0, 0, 0, 1))
    g = linear_scan(later.flip(1), grad.flip(1), -2).flip(1)
    start = torch.zeros_like(states[:, 0]) if initial_state is None else initial_state
    return g * torch.cat((start[:, None], states[:, :-1]), 1), g
