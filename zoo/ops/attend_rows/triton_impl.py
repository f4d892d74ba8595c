"""Attention to a ragged cache in Triton for CUDA GPUs: looks at the cache where it lies, computes in float32.

One program takes the query heads of one key head of one token, and goes through what its row holds in tiles, keeping
the largest score so far and the sums relative to it.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, it runs on the CPU, slowly, for tests.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: dict[str, int] = {"C": 32, "num_warps": 4}  # tokens of the cache, and what the compiler is told

# The kernels' arguments are pointers and numbers that Triton types itself.
# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _kernel(
    q, keys, values, rows, counts, out, scale, group, width,
    key_row, key_head, key_token, value_row, value_head, value_token,
    G: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, count = tl.load(rows + token), tl.load(counts + token)
    g, w, c = tl.arange(0, G), tl.arange(0, W), tl.arange(0, C)
    at = ((token * tl.num_programs(1) + head) * group + g[:, None]) * width + w[None, :]
    real = (g < group)[:, None] & (w < width)[None, :]
    query = tl.load(q + at, mask=real, other=0.0).to(tl.float32) * scale
    keys += row * key_row + head * key_head
    values += row * value_row + head * value_head
    largest = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    mixed = tl.zeros([G, W], tl.float32)
    for start in range(0, count, C):
        t = start + c
        inside = (t < count)[:, None] & (w < width)[None, :]
        k = tl.load(keys + t[:, None] * key_token + w[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + t[:, None] * value_token + w[None, :], mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * k[None, :, :], 2)
        scores = tl.where((t < count)[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp(scores - above[:, None])
        shrink = tl.exp(largest - above)
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None] + tl.sum(shares[:, :, None] * v[None, :, :], 1)
        largest = above
    tl.store(out + at, mixed / total[:, None], mask=real)


def forward(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """As :func:`zoo.ops.attend_rows.attend_rows`."""
    q = q.contiguous()
    keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (keys, values))
    out = torch.empty_like(q)
    tokens, heads, width = q.shape
    key_heads = keys.shape[1]
    if tokens:
        _kernel[(tokens, key_heads)](
            q,
            keys,
            values,
            rows.contiguous(),
            counts.contiguous(),
            out,
            1 / math.sqrt(width),
            heads // key_heads,
            width,
            *keys.stride()[:3],
            *values.stride()[:3],
            G=triton.next_power_of_2(heads // key_heads),
            W=triton.next_power_of_2(width),
            **TILE,
        )
    return out
