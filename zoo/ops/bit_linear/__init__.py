"""A linear layer on int8 activations and ternary weights, behind a norm of its own."""

import torch
from torch import Tensor

from zoo.errors import ShapeError
from zoo.ops.bit_linear.reference import bit_linear_reference

__all__ = ["bit_linear", "bit_linear_reference"]


def bit_linear(x: Tensor, weight: Tensor, norm_weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMSNorm, then a linear map of activations in int8 by weights in -1, 0 and 1::

        y   = x / sqrt(mean(x^2) + eps) norm_weight
        q   = round(y 127 / max|y|) max|y| / 127          for each token, halves away from zero
        W_q = clamp(round(W / mean|W|), -1, 1) mean|W|    for the whole matrix
        out = q W_q^T

    Gradients go straight through both roundings: ``dW = dout^T q``, ``dy = dout W_q``.

    Args:
        x: Input, ``[..., Cin]``.
        weight: Full-precision weight, ``[Cout, Cin]``.
        norm_weight: Weight of the norm, ``[Cin]``.
        eps: Of the norm. The released code declares 1e-8 and runs with 1e-6.

    Returns:
        ``[..., Cout]`` in the dtype of ``x``; the arithmetic is in float32 (float64 where ``x`` is), and the product of
        integers exact.

    Raises:
        ShapeError: If shapes or devices disagree or a tensor is not real and floating-point.

    Source: MatMul-free LM, arXiv:2406.02528, Section 3.2 and Algorithm 1.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ShapeError(f"x has shape {list(x.shape)}; expected [..., {weight.shape[-1]}].")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return bit_linear_reference(x.to(dtype), weight.to(dtype), norm_weight.to(dtype), eps).to(x.dtype)
