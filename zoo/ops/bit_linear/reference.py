"""BitLinear in plain PyTorch, written for reading; its gradients are autograd's."""

import torch
import torch.nn.functional as F
from torch import Tensor

_JUST_BELOW_HALF = 0.49999997  # float32; adding it to a number that is just below one half does not round up to one


def round_half_away(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero, as the released kernel rounds activations. For |x| < 2^22."""
    half = 0.5 if x.dtype == torch.float64 else _JUST_BELOW_HALF
    return torch.trunc(x + half * torch.sign(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def quantise_activations(y: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -128 to 127, in the dtype of ``y``, and what one step of them is worth, ``[..., 1]``."""
    largest = y.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return round_half_away(y * (127 / largest)).clamp(-128, 127), largest / 127


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-1, 0 and 1, in the dtype of ``weight``, and what 1 is worth, ``[]``; halves go to even, as they do there."""
    scale = weight.abs().mean().clamp_min(1e-5)
    return torch.round(weight * (1 / scale)).clamp(-1, 1), scale


def pack_ternary(ternary: Tensor) -> Tensor:
    """-1, 0 and 1, ``[Cout, Cin]``, at two bits each: ``[R, Cin]`` uint8, where R is Cout / 4, rounded up.

    Byte k of packed row r holds the rows r, r + R, r + 2R and r + 3R at column k, plus one, lowest bits first: the
    layout of transformers' ``bitnet`` quantisation. It suits the kernels too, since one vector of packed bytes gives
    four of weights that all meet the same vector of activations.
    """
    rows = -(-len(ternary) // 4)
    codes = F.pad((ternary + 1).to(torch.uint8), (0, 0, 0, 4 * rows - len(ternary)))  # [4 R, Cin]
    first, second, third, fourth = codes.view(4, rows, -1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_ternary(packed: Tensor, out_features: int) -> Tensor:
    """What :func:`pack_ternary` packed, ``[Cout, Cin]`` int8."""
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return codes[:out_features].to(torch.int8) - 1


def bit_linear_reference(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float = 1e-6) -> Tensor:
    """What :func:`zoo.ops.bit_linear` computes, for tensors of one dtype, float32 or float64.

    The product of integers is exact: in float32 up to 2^17 inputs, as each is at most 128 and 2^24 is the limit.

    Source: MatMul-free LM, arXiv:2406.02528, Section 3.2 and Algorithm 1, with the numbers of the released code.
    """
    y = rms_norm(x, norm_weight, eps)
    with torch.no_grad():
        codes, step = quantise_activations(y)
        ternary, scale = quantise_weight(weight)
        exact = F.linear(codes, ternary) * (step * scale)
    # Straight through: the gradient is that of the product of what the integers stand for.
    quantised_y = y + (codes * step - y).detach()
    quantised_weight = weight + (ternary * scale - weight).detach()
    product = F.linear(quantised_y, quantised_weight)
    return product + (exact - product).detach()


def packed_bit_linear_reference(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float = 1e-6
) -> Tensor:
    """What :func:`zoo.ops.packed_bit_linear` computes, for ``x`` and norm of one dtype."""
    codes, step = quantise_activations(rms_norm(x, norm_weight, eps))
    return F.linear(codes, unpack_ternary(packed, out_features).to(x.dtype)) * (step * scale.to(x.dtype))
