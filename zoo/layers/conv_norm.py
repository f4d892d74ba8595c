"""Convolution or linear layer with batch norm, and folding one into the other.

A module that has a plain equivalent in eval mode offers ``fuse() -> nn.Module``; :func:`fuse_batch_norm` puts the
equivalents in place throughout a network.
"""

from typing import Any

import torch
from torch import Tensor, nn


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as ``y = scale * x + shift``, both ``[C]`` float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise RuntimeError("A batch norm without running statistics cannot be folded.")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution that does both in eval mode. The product is formed in float64, then rounded once."""
    scale, shift = scale_and_shift(norm)
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    fused.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    assert fused.bias is not None
    fused.bias.copy_(shift if conv.bias is None else shift + scale * conv.bias.double())
    return fused.train(conv.training)


def fuse_pairs(module: nn.Module, **pairs: str) -> None:
    """Fold, in place, the batch norms of a module that keeps them beside its convolutions, as timm's names often ask.

    Each pair is ``convolution="norm"``, by attribute; an identity takes the norm's place.
    """
    for conv, norm in pairs.items():
        if isinstance(getattr(module, norm), nn.BatchNorm2d):  # not pruned, nor fused before
            setattr(module, conv, fold_norm(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


class ConvNorm(nn.Sequential):
    """Convolution, then batch norm: ``[B, Cin, H, W] -> [B, Cout, H', W']``.

    Args:
        in_channels, out_channels: Channel counts.
        kernel_size, stride, groups: As in ``nn.Conv2d``; padding is ``kernel_size // 2``.
        bias: Whether the convolution has one of its own, which the batch norm makes redundant.
        norm_weight: What the batch norm's weight starts at; 0 makes a residual branch start as nothing.
        eps: The batch norm's epsilon.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_weight: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.norm_weight = norm_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the batch norm's weight to its starting value; the convolution initialises itself."""
        nn.init.constant_(self.bn.weight, self.norm_weight)

    def fuse(self) -> nn.Conv2d:
        """The convolution that does both in eval mode."""
        return fold_norm(self.conv, self.bn)


class NormLinear(nn.Sequential):
    """Batch norm, dropout, linear: ``[B, Cin] -> [B, Cout]``, LeViT's classifier."""

    def __init__(self, in_features: int, out_features: int, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.drop = nn.Dropout(drop_rate)
        self.linear = nn.Linear(in_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of std 0.02 for the weight, zero for the bias."""
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The linear layer that does all of it in eval mode. Formed in float64, then rounded once."""
        scale, shift = scale_and_shift(self.bn)
        linear = self.linear
        fused = nn.Linear(
            linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
        )
        weight = linear.weight.double()
        fused.weight.copy_(weight * scale)
        fused.bias.copy_(weight @ shift + linear.bias.double())
        return fused.train(self.training)


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Replace, in place and children first, every submodule that offers ``fuse()`` by what it returns."""
    child: Any
    for name, child in list(model.named_children()):
        fuse_batch_norm(child)
        if hasattr(child, "fuse"):
            setattr(model, name, child.fuse())
    return model
