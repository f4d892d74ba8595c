"""The selective scan of Mamba: one function, and implementations of it for each kind of device.

    reference.py      step by step, written for reading
    selective_scan.cpp, cpu.py  C++ for CPUs, built at first use
    vectorised.py     PyTorch operators over chunks of time, for everything else, and for export to ONNX
    triton_impl.py    Triton, for CUDA GPUs
    mamba.py          mamba-ssm's CUDA kernel, where it is installed

``ZOO_SELECTIVE_SCAN=ref|cpu|torch|triton|mamba`` in the environment forces one; ``zoo doctor`` says which one runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops._checks import cast, compute_dtype
from zoo.ops._dispatch import constant_when_traced
from zoo.ops.selective_scan import vectorised
from zoo.ops.selective_scan._dispatch import choose
from zoo.ops.selective_scan._op import check, scan
from zoo.ops.selective_scan.reference import selective_scan_reference

__all__ = ["choose", "onnx_decompositions", "selective_scan", "selective_scan_reference"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """A diagonal state-space recurrence whose parameters change with time, along the last dimension.

    For each channel, with its group's B and C::

        dt[t] = delta[t] + delta_bias, through softplus if asked
        h[t]  = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]        (N states, from 0)
        y[t]  = (C[t] . h[t] + D u[t]) silu(z[t])

    Args:
        u: Input, ``[B, D, L]``. L may be 0.
        delta: Step sizes, ``[B, D, L]``.
        A: State matrix, diagonal, ``[D, N]``; negative for a state that decays.
        B, C: Input and output maps, ``[B, N, L]``, or ``[B, G, N, L]`` for G groups: channel d is in ``d // (D / G)``.
        D: Skip connection, ``[D]``.
        z: Gate, ``[B, D, L]``.
        delta_bias: ``[D]``.
        delta_softplus: Whether step sizes go through softplus, after the bias.
        return_last_state: Whether to return the state after the last step too.

    Returns:
        ``[B, D, L]`` in the dtype of ``u``; with ``return_last_state`` a tuple of that and ``[B, D, N]``. The
        recurrence runs in float32 (in float64 where ``u`` is), whatever the inputs' dtypes, and any strides will do.
        All inputs have gradients, and both outputs pass them on; there are no second derivatives. NaN goes into
        what follows it in its channel.

    Raises:
        ShapeError: If shapes or devices disagree or a tensor is not real and floating-point.
        ConfigError: If ``ZOO_SELECTIVE_SCAN`` asks for what does not exist or cannot run on this device.

    Source: Mamba, arXiv:2312.00752, Algorithm 2. The signature and the results are those of ``mamba-ssm``.
    """
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    route = _route()
    if route == "op":
        y, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        check(u, delta, A, B, C, D, z, delta_bias)
        form: Callable[..., tuple[Tensor, Tensor]] = selective_scan_reference if route == "ref" else vectorised.exported
        tensors = cast(compute_dtype(u), u, delta, A, B, C, D, z, delta_bias)
        y, last_state = form(*tensors, delta_softplus)
        y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


@constant_when_traced
def _route() -> str:
    return choose.route()


def onnx_decompositions() -> dict[Any, Callable[..., Any]]:
    """What turns the operator in a ``torch.export`` program into standard ones, for ``program.run_decompositions``.

    ``torch.onnx.export(model, ..., dynamo=True)`` needs nothing of this: it gets standard operators from the start.
    A program that was exported before does: ``program.run_decompositions(onnx_decompositions())``, added to
    ``torch.export.default_decompositions()`` as needed.
    """
    return {torch.ops.zoo.selective_scan.default: vectorised.exported}
