"""Attention to a ragged cache as its definition says, one token after the other."""

import math

import torch
from torch import Tensor


def attend_rows_reference(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Arguments and result as of :func:`zoo.ops.attend_rows.attend_rows`."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for i, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
        for head in range(q.shape[1]):
            k, v = keys[row, head // group, :count], values[row, head // group, :count]
            scores = k @ q[i, head] / math.sqrt(q.shape[-1])
            out[i, head] = scores.softmax(0) @ v
    return out
