"""BitLinear: a linear layer on int8 activations and ternary weights, behind a norm of its own.

    reference.py      written for reading, and the layout of packed weights
    bit_linear.cpp, cpu.py  C++ for CPUs, built at first use: AVX-512 VNNI, AVX-VNNI, AVX2 or portable
    vectorised.py     PyTorch operators, for everything else and for export to ONNX; the gradients, for all
    triton_impl.py    Triton, for CUDA GPUs

``ZOO_BIT_LINEAR=ref|cpu|triton|torch`` in the environment forces one; ``zoo doctor`` says which one runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ShapeError, WeightsError
from zoo.ops._checks import cast, compute_dtype
from zoo.ops._dispatch import constant_when_traced
from zoo.ops.bit_linear import cpu, vectorised
from zoo.ops.bit_linear._dispatch import choose
from zoo.ops.bit_linear._op import check, check_inputs, check_packed, linear, packed_linear, run_packed
from zoo.ops.bit_linear.reference import (
    bit_linear_reference,
    pack_ternary,
    packed_bit_linear_reference,
    quantise_weight,
    unpack_ternary,
)

__all__ = [
    "bit_linear",
    "bit_linear_reference",
    "choose",
    "is_unobserved",
    "onnx_decompositions",
    "pack_ternary",
    "pack_weight",
    "packed_bit_linear",
    "packed_bit_linear_reference",
    "unpack_ternary",
]


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
        integers exact. There are no second derivatives.

    Raises:
        ShapeError: If shapes or devices disagree, a tensor is not real and floating-point, or Cin is over 2^17.
        ConfigError: If ``ZOO_BIT_LINEAR`` asks for what does not exist or cannot run on this device.

    Source: MatMul-free LM, arXiv:2406.02528, Section 3.2 and Algorithm 1.
    """
    route = _route()
    if route == "op":
        return linear(x, weight, norm_weight, eps)
    check(x, weight, norm_weight)
    form = bit_linear_reference if route == "ref" else vectorised.forward
    x_, weight, norm_weight = cast(compute_dtype(x), x, weight, norm_weight)
    return form(x_, weight, norm_weight, eps).to(x.dtype)


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A full-precision weight, ``[Cout, Cin]``, as :func:`packed_bit_linear` takes it: two bits for each, and a scale.

    Raises:
        ShapeError: If it is not a real matrix, or has more than 2^17 columns.
        WeightsError: If there is NaN or infinity in it.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ShapeError(f"weight is {weight.dtype} of shape {list(weight.shape)}; expected a real [Cout, Cin].")
    check_inputs(weight.shape[1])
    if not weight.isfinite().all():
        raise WeightsError("The weight is not finite: there is NaN or infinity in it.")
    ternary, scale = quantise_weight(weight.detach().to(compute_dtype(weight)))
    return pack_ternary(ternary), scale.float()


def packed_bit_linear(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, *, out_features: int, eps: float = 1e-6
) -> Tensor:
    """:func:`bit_linear` with weights at two bits each, which are never expanded to a whole matrix. For inference.

    Args:
        x: Input, ``[..., Cin]``.
        packed: Weights, ``[R, Cin]`` uint8 with R = Cout / 4, rounded up: see :func:`pack_ternary`.
        scale: What a weight of 1 is worth, one number, float32.
        norm_weight: Weight of the norm, ``[Cin]``.
        out_features: Cout.
        eps: Of the norm.

    Returns:
        ``[..., Cout]`` in the dtype of ``x``. The product of int8 and ternary numbers is exact in int32. There are no
        gradients.

    Raises:
        ShapeError: If shapes, dtypes or devices disagree.
        ConfigError: If ``ZOO_BIT_LINEAR`` asks for what does not exist or cannot run on this device.
    """
    if (unobserved := is_unobserved(x)) and (
        out := cpu.at_once(x, packed, scale, norm_weight, out_features, eps)
    ) is not None:
        return out
    check_packed(x, packed, scale, norm_weight, out_features)
    route = _route()
    if route == "op":
        if unobserved:
            return run_packed(x, packed, scale, norm_weight, out_features, eps)
        return packed_linear(x, packed, scale, norm_weight, out_features, eps)
    form = packed_bit_linear_reference if route == "ref" else vectorised.packed_forward
    x_, norm_weight = cast(compute_dtype(x), x, norm_weight)
    return form(x_, packed, scale, norm_weight, out_features, eps).to(x.dtype)


@constant_when_traced
def _route() -> str:
    return choose.route()


def is_unobserved(x: Tensor) -> bool:
    """Whether nothing looks on: the call of an operator that is written in Python takes longer than a small product."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
        return False
    return type(x) is Tensor and torch._C._len_torch_dispatch_stack() == 0


def onnx_decompositions() -> dict[Any, Callable[..., Any]]:
    """As :func:`zoo.ops.selective_scan.onnx_decompositions`, for these operators."""
    return {
        torch.ops.zoo.bit_linear.default: vectorised.forward,
        torch.ops.zoo.packed_bit_linear.default: vectorised.packed_forward,
    }
