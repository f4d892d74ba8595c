"""The gated recurrence of HGRN, element by element."""

import torch
from torch import Tensor

from zoo.errors import ShapeError
from zoo.ops.hgrn_scan.reference import hgrn_scan_reference

__all__ = ["hgrn_scan", "hgrn_scan_reference"]


def hgrn_scan(f: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence ``s[t] = f[t] s[t-1] + v[t]``, element by element, along time.

    Args:
        f: Forget gates, ``[B, T, D]``.
        v: What enters the state, ``[B, T, D]``.
        initial_state: The state before the first step, ``[B, D]``; zero if there is none.

    Returns:
        The state after each step, ``[B, T, D]`` in the dtype of ``v``, and the one after the last step, ``[B, D]`` in
        float32, in which the recurrence runs whatever the inputs' dtypes (float64 where ``v`` is float64).

    Raises:
        ShapeError: If shapes or devices disagree or a tensor is not real and floating-point.

    Source: HGRN, arXiv:2311.04823, Equation 5, as MatMul-free LM, arXiv:2406.02528, uses it.
    """
    if v.ndim != 3:
        raise ShapeError(f"v has shape {list(v.shape)}; expected [B, T, D].")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    states, last_state = hgrn_scan_reference(
        f.to(dtype), v.to(dtype), None if initial_state is None else initial_state.to(dtype)
    )
    return states.to(v.dtype), last_state
