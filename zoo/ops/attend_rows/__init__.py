"""Attention of one new token in each of some sequences to what a ragged cache holds: one function for decoding.

    reference.py      row by row, written for reading
    attend_rows.cpp, cpu.py  C++ for CPUs, built at first use: looks at the cache where it lies
    triton_impl.py    Triton for CUDA GPUs, likewise
    gathered.py       PyTorch's attention on a copy of the rows, under a mask, for everything else

``ZOO_ATTEND_ROWS=ref|cpu|triton|torch`` in the environment forces one; ``zoo doctor`` says which one runs.
"""

import torch
from torch import Tensor

from zoo.errors import ShapeError
from zoo.ops.attend_rows import gathered
from zoo.ops.attend_rows._dispatch import choose
from zoo.ops.attend_rows.reference import attend_rows_reference

__all__ = ["attend_rows", "attend_rows_reference", "choose"]


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Softmax attention of one new token in each of some rows to all tokens that its row holds.

    Args:
        q: ``[N, H, K]``.
        keys, values: ``[B, Hkv, capacity, K]``; Hkv divides H. What lies beyond a row's count must be finite.
        rows: ``[N]`` int64, which row each token belongs to.
        counts: ``[N]`` int64, how many tokens that row holds, at least 1.

    Returns:
        ``[N, H, K]`` in the dtype of ``q``.

    The kernels have no derivatives: under autograd, PyTorch's attention runs. That for CPUs takes float32 and float64,
    that for GPUs float32 and what is shorter.

    Raises:
        ShapeError: If the shapes disagree.
        ConfigError: If ``ZOO_ATTEND_ROWS`` asks for what does not exist or cannot run on this device.
    """
    heads, width = q.shape[-2:]
    if keys.shape != values.shape or keys.shape[-1] != width or heads % keys.shape[1] or len(rows) != len(q):
        raise ShapeError(
            f"q is {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}, rows {list(rows.shape)}; "
            "expected [N, H, K], twice [B, Hkv, capacity, K] with a divisor of H, and [N]."
        )
    plain = torch.compiler.is_compiling() or (q.is_cpu and q.dtype not in (torch.float32, torch.float64))
    if plain or (torch.is_grad_enabled() and q.requires_grad):
        return gathered.forward(q, keys, values, rows, counts)
    return choose(q.device, q.dtype).module.forward(q, keys, values, rows, counts)
