"""The gated recurrence of HGRN, step by step, written for reading; its gradients are autograd's."""

import torch
from torch import Tensor


def hgrn_scan_reference(f: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What :func:`zoo.ops.hgrn_scan` computes, for tensors of one dtype.

    Returns:
        The state after each step, ``[B, T, D]``, and after the last one, ``[B, D]``.

    Source: HGRN, arXiv:2311.04823, Equation 5, as MatMul-free LM, arXiv:2406.02528, uses it.
    """
    state = torch.zeros_like(v[:, 0]) if initial_state is None else initial_state
    states = []
    for f_t, v_t in zip(f.unbind(1), v.unbind(1), strict=True):
        state = f_t * state + v_t
        states.append(state)
    return torch.stack(states, 1), state
