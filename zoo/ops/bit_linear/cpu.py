"""The CPU implementation in C++, for float32."""

from pathlib import Path

import torch
from torch import Tensor

from zoo.ops._extension import Extension

# Without fused multiply-adds activations are rounded exactly as PyTorch's operators round them.
EXTENSION = Extension("bit_linear", Path(__file__).with_name("bit_linear.cpp"), flags=("-ffp-contract=off",))


def kernels() -> list[str]:
    """The instruction sets that there are kernels for and that this processor has, best first."""
    return torch.ops.zoo_cpu.bit_linear_kernels()


def is_ready_for(x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor) -> bool:
    """Whether :func:`packed_forward` takes these at once: the kernel is built, nothing need be cast."""
    return (
        EXTENSION.ready
        and x.is_cpu
        and x.dtype is norm_weight.dtype is scale.dtype is torch.float32
        and packed.dtype is torch.uint8
        and x.shape[-1:] == norm_weight.shape == packed.shape[1:]
    )


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
