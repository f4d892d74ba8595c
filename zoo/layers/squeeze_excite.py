"""Squeeze-and-excitation."""

from typing import Any

from torch import Tensor, nn

from zoo.config import make_divisible
from zoo.layers.linear import as_linear


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from its global mean: ``[B, C, H, W] -> [B, C, H, W]``.

    Source: arXiv:1709.01507. The hidden width is ``channels * ratio`` rounded to a multiple of 8, as in timm.
    """

    def __init__(self, channels: int, *, ratio: float) -> None:
        super().__init__()
        hidden = make_divisible(channels * ratio, round_limit=0.0)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.act(self.fc1(gate))).sigmoid()

    def fuse(self) -> "FusedSqueezeExcite":
        return FusedSqueezeExcite(self.fc1, self.act, self.fc2)


class FusedSqueezeExcite(nn.Module):
    """Squeeze-and-excitation in eval mode: on one position, a 1x1 convolution is a linear layer, and that is faster.

    ``[B, C, H, W] -> [B, C, H, W]``; ``inplace`` scales the input itself.
    """

    def __init__(self, reduce: Any, act: nn.Module, expand: Any, *, inplace: bool = False) -> None:
        super().__init__()
        self.reduce = as_linear(reduce)
        self.act = act
        self.expand = as_linear(expand)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.act(self.reduce(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        return x.mul_(gate) if self.inplace else x * gate
