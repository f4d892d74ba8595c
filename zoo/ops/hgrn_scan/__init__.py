"""The gated recurrence of HGRN: one function, and implementations of it for each kind of device.

    reference.py      step by step, written for reading
    hgrn_scan.cpp, cpu.py  C++ for CPUs, built at first use
    vectorised.py     PyTorch operators over whole sequences, for everything else, and for export to ONNX
    triton_impl.py    Triton, for CUDA GPUs

``ZOO_HGRN_SCAN=ref|cpu|triton|torch`` in the environment forces one; ``zoo doctor`` says which one runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops._checks import cast, compute_dtype
from zoo.ops._dispatch import constant_when_traced
from zoo.ops.hgrn_scan import vectorised
from zoo.ops.hgrn_scan._dispatch import choose
from zoo.ops.hgrn_scan._op import check, scan
from zoo.ops.hgrn_scan.reference import hgrn_scan_reference

__all__ = ["choose", "hgrn_scan", "hgrn_scan_reference", "onnx_decompositions"]


def hgrn_scan(f: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence ``s[t] = f[t] s[t-1] + v[t]``, element by element, along time.

    Args:
        f: Forget gates, ``[B, T, D]``.
        v: What enters the state, ``[B, T, D]``.
        initial_state: The state before the first step, ``[B, D]``; zero if there is none.

    Returns:
        The state after each step, ``[B, T, D]`` in the dtype of ``v``, and the one after the last step, ``[B, D]`` in
        float32, in which the recurrence runs whatever the inputs' dtypes (float64 where ``v`` is float64).

    T may be 0. There are no second derivatives.

    Raises:
        ShapeError: If shapes or devices disagree or a tensor is not real and floating-point.
        ConfigError: If ``ZOO_HGRN_SCAN`` asks for what does not exist or cannot run on this device.

    Source: HGRN, arXiv:2311.04823, Equation 5, as MatMul-free LM, arXiv:2406.02528, uses it.
    """
    route = _route()
    one_step = v.ndim == 3 and v.shape[1] == 1 and not torch.compiler.is_compiling()  # decoding: nothing to choose
    if (route == "op" and not one_step) or (v.ndim == 3 and v.shape[1] == 0):
        return scan(f, v, initial_state)
    check(f, v, initial_state)
    tensors = cast(compute_dtype(v), f, v, initial_state)
    if route == "export":
        states = vectorised.forward(*tensors)
        return states.to(v.dtype), states[:, -1]
    states, last_state = hgrn_scan_reference(*tensors)
    return states.to(v.dtype), last_state


@constant_when_traced
def _route() -> str:
    return choose.route()


def onnx_decompositions() -> dict[Any, Callable[..., Any]]:
    """As :func:`zoo.ops.selective_scan.onnx_decompositions`, for this operator. T is then fixed."""

    def decomposed(f: Tensor, v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        states = vectorised.forward(f, v, initial_state)
        return states, states[:, -1]

    return {torch.ops.zoo.hgrn_scan.default: decomposed}
