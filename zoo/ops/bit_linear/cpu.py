"""The CPU implementation in C++, for float32."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoo.ops._extension import Extension

# Without fused multiply-adds activations are rounded exactly as PyTorch's operators round them.
EXTENSION = Extension("bit_linear", Path(__file__).with_name("bit_linear.cpp"), flags=("-ffp-contract=off",))


def kernels() -> list[str]:
    """The instruction sets that there are kernels for and that this processor has, best first."""
    return torch.ops.zoo_cpu.bit_linear_kernels()


def at_once(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float
) -> Tensor | None:
    """:func:`packed_forward` where nothing need be built, cast, refused or chosen; None elsewhere."""
    if not EXTENSION.ready:
        return None
    return torch.ops.zoo_cpu.packed_bit_linear_at_once.default(x, packed, scale, norm_weight, out_features, eps)


def forward(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """As :func:`zoo.ops.bit_linear.vectorised.forward`; the weight is packed for the product."""
    scale = weight.abs().mean().clamp_min(1e-5)
    packed = torch.ops.zoo_cpu.pack_ternary(weight.contiguous(), scale)
    return packed_forward(x, packed, scale, norm_weight, len(weight), eps)


def packed_forward(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float
) -> Tensor:
    """As :func:`zoo.ops.bit_linear.vectorised.packed_forward`."""
    return torch.ops.zoo_cpu.packed_bit_linear.default(x, packed, scale, norm_weight, out_features, eps)


def matmulfree_step(
    x: Tensor,
    states: Sequence[Tensor],
    floors: Tensor,
    layers: Sequence[Tensor],
    norms: Sequence[Tensor],
    norm_eps: float,
    layer_eps: float,
    operators: bool = False,
) -> tuple[Tensor, list[Tensor]] | None:
    """L blocks of MatMul-free LM for one new token of each row; all is float32 on the CPU, but packed weights.

    Args:
        x: ``[B, D]``.
        states: Of each block before the token, ``[B, D]`` each.
        floors: The least that each channel keeps, ``[L, D]``, contiguous.
        layers: Packed weights, scale and the norm's weight of each block's i_proj, f_proj, g_proj, o_proj, gate_proj
            and down_proj, contiguous.
        norms: Weights of each block's token mixer's, channel mixer's and gate's norm, contiguous.
        norm_eps: Of those.
        layer_eps: Of the layers' norms.
        operators: Compute all but the products by torch's operators, which is slower and should be the same.

    Returns:
        What the last block makes of ``x``, and the states after the token; None where a tensor is of another device,
        dtype or size, or not contiguous.
    """
    step = torch.ops.zoo_cpu.matmulfree_step.default
    out, after = step(x, states, floors, layers, norms, norm_eps, layer_eps, operators)
    return None if out is None else (out, after)
