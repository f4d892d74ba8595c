"""The selective scan, step by step, written for reading; its gradients are autograd's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`zoo.ops.selective_scan` computes, for ``B`` and ``C`` with groups and all tensors of one dtype.

    Returns:
        y ``[B, D, L]`` and the state after the last step ``[B, D, N]``.

    Source: Mamba, arXiv:2312.00752, Equation 2 with the discretisation of Section 2 (Euler for B) and Algorithm 2.
    """
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    channels_per_group = u.shape[1] // B.shape[1]
    B, C = (x.repeat_interleave(channels_per_group, dim=1) for x in (B, C))  # [B, G, N, L] -> [B, D, N, L]

    state = u.new_zeros(*u.shape[:2], A.shape[1])  # [B, D, N]
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(-1) for x in (u, delta, B, C)), strict=True):
        decay = torch.exp(delta_t[:, :, None] * A)
        state = decay * state + (delta_t * u_t)[:, :, None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, -1) if outputs else torch.zeros_like(u)  # [B, D, L]

    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, state
