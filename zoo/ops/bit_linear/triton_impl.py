"""BitLinear in Triton for CUDA GPUs: the norm and quantisation of a token in one kernel, the packed product in others.

One product is for a few tokens, as in decoding: a program owns some packed rows and adds up products of int8 and codes.
The other is for many: it unpacks one weight of each byte of a tile into int8 and lets the tensor cores multiply them
with a tile of tokens, exactly, in int32. Neither writes an unpacked weight to memory.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, it runs on the CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.bit_linear.reference import pack_ternary, quantise_weight

FEW = 8  # tokens up to which the product is that of decoding
# Tiles, and what the compiler is told of them; measured on an H200.
NORM: dict[str, int] = {"num_warps": 8}
FEW_TILE: dict[str, int] = {"R": 1, "K": 1024, "num_warps": 2}  # packed rows, columns
MANY_TILES: tuple[tuple[float, dict[str, int]], ...] = (  # up to so many tokens: tokens, packed rows, columns
    (32, {"M": 32, "R": 16, "K": 256, "num_warps": 4, "num_stages": 3}),
    (256, {"M": 64, "R": 16, "K": 256, "num_warps": 4, "num_stages": 3}),
    (2048, {"M": 128, "R": 64, "K": 128, "num_warps": 8, "num_stages": 3}),
    (float("inf"), {"M": 256, "R": 64, "K": 64, "num_warps": 8, "num_stages": 3}),
)

# The kernels' arguments are pointers and numbers that Triton types itself.
# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _quantise_kernel(x, norm_weight, codes, step, sums, eps, columns, K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    inside = k < columns
    value = tl.load(x + token * columns + k, mask=inside, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    y = value * inverse * tl.load(norm_weight + k, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-5)
    bad = tl.sum(tl.where(y == y, 0, 1), 0) > 0
    scaled = y * (127.0 / largest)
    rounded = scaled + tl.where(scaled < 0, -0.49999997, 0.49999997)  # halves away from zero, as int() cuts off
    code = tl.where(bad, 0.0, tl.minimum(tl.maximum(rounded, -128.0), 127.0)).to(tl.int32)
    tl.store(codes + token * columns + k, code.to(tl.int8), mask=inside)
    tl.store(step + token, tl.where(bad, float("nan"), largest / 127.0))
    tl.store(sums + token, tl.sum(code, 0))


@triton.jit
def _few_kernel(
    codes, step, sums, packed, scale, out, packed_rows, rows, columns, R: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * R + tl.arange(0, R)
    first = tl.zeros([R], tl.int32)
    second = tl.zeros([R], tl.int32)
    third = tl.zeros([R], tl.int32)
    fourth = tl.zeros([R], tl.int32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (r < packed_rows)[:, None] & (k < columns)[None, :]
        w = tl.load(packed + r[:, None].to(tl.int64) * columns + k[None, :], mask=inside, other=0).to(tl.int32)
        a = tl.load(codes + token * columns + k, mask=k < columns, other=0).to(tl.int32)[None, :]
        first += tl.sum((w & 3) * a, 1)
        second += tl.sum((w >> 2 & 3) * a, 1)
        third += tl.sum((w >> 4 & 3) * a, 1)
        fourth += tl.sum((w >> 6) * a, 1)
    total = tl.load(sums + token)
    unit = tl.load(step + token) * tl.load(scale)
    target = out + token * rows
    real = r < packed_rows
    tl.store(target + r, (first - total).to(tl.float32) * unit, mask=real & (r < rows))
    r += packed_rows
    tl.store(target + r, (second - total).to(tl.float32) * unit, mask=real & (r < rows))
    r += packed_rows
    tl.store(target + r, (third - total).to(tl.float32) * unit, mask=real & (r < rows))
    r += packed_rows
    tl.store(target + r, (fourth - total).to(tl.float32) * unit, mask=real & (r < rows))


@triton.jit
def _many_kernel(
    codes, step, packed, scale, out, tokens, packed_rows, rows, columns,
    M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    r = tl.program_id(1) * R + tl.arange(0, R)
    shift = (2 * tl.program_id(2)).to(tl.uint8)  # which of the four weights of a byte
    total = tl.zeros([M, R], tl.int32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        real = k < columns
        w = tl.load(
            packed + r[None, :].to(tl.int64) * columns + k[:, None],
            mask=(r < packed_rows)[None, :] & real[:, None],
            other=0,
        )
        a = tl.load(  # where there is no weight, activations are 0
            codes + m[:, None].to(tl.int64) * columns + k[None, :],
            mask=(m < tokens)[:, None] & real[None, :],
            other=0,
        )
        weight = (w >> shift & 3).to(tl.int8) - 1
        total = tl.dot(a, weight.to(tl.int8), total, out_dtype=tl.int32)
    unit = tl.load(step + m, mask=m < tokens, other=0.0) * tl.load(scale)
    row = r + tl.program_id(2) * packed_rows
    tl.store(
        out + m[:, None].to(tl.int64) * rows + row[None, :],
        total.to(tl.float32) * unit[:, None],
        mask=(m < tokens)[:, None] & ((r < packed_rows) & (row < rows))[None, :],
    )


def forward(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """As :func:`zoo.ops.bit_linear.vectorised.forward`; the weight is packed on the way."""
    ternary, scale = quantise_weight(weight)
    return packed_forward(x, pack_ternary(ternary), scale, norm_weight, len(weight), eps)


def packed_forward(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float
) -> Tensor:
    """As :func:`zoo.ops.bit_linear.vectorised.packed_forward`."""
    packed_rows, columns = packed.shape
    x = x.contiguous()
    tokens = x.numel() // columns
    codes = x.new_empty(tokens, columns, dtype=torch.int8)
    step, sums = x.new_empty(tokens), x.new_empty(tokens, dtype=torch.int32)
    width = triton.next_power_of_2(columns)
    _quantise_kernel[(tokens,)](x, norm_weight.contiguous(), codes, step, sums, eps, columns, K=width, **NORM)
    out = x.new_empty(*x.shape[:-1], out_features)
    packed = packed.contiguous()
    if tokens <= FEW:
        _few_kernel[(tokens, triton.cdiv(packed_rows, FEW_TILE["R"]))](
            codes, step, sums, packed, scale, out, packed_rows, out_features, columns, **FEW_TILE
        )
        return out
    tile = next(tile for most, tile in MANY_TILES if tokens <= most)
    _many_kernel[(triton.cdiv(tokens, tile["M"]), triton.cdiv(packed_rows, tile["R"]), 4)](
        codes, step, packed, scale, out, tokens, packed_rows, out_features, columns, **tile
    )
    return out
