"""Attention to a ragged cache by PyTorch's own, on a copy of the rows; on the cache itself where all are looked at."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """As :func:`zoo.ops.attend_rows.attend_rows`."""
    if not len(rows):
        return q.clone()
    longest = int(counts.max())
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    if len(rows) != len(keys) or not torch.equal(rows, torch.arange(len(keys), device=rows.device)):
        keys, values = keys[rows], values[rows]
    mask = (torch.arange(longest, device=rows.device) < counts[:, None])[:, None, None]
    # The query heads of a key head are as many queries, so that no key has to be repeated for them.
    grouped = q.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, keys, values, mask).flatten(1, 2)
