"""A stage: the part of a network that works at one resolution."""

from collections.abc import Iterable

from torch import Tensor, nn


class Stage(nn.Module):
    """Downsampling, an identity in the first stage, then blocks: ``[B, dim_in, H, W] -> [B, dim, H', W']``."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))
