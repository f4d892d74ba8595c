"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, drops a residual branch for a whole sample with probability ``rate`` and rescales the rest.

    ``[B, ...] -> [B, ...]``. The identity in eval mode. Source: arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Per stage, per block: rates that rise linearly from 0 at the first block to ``rate`` at the last."""
    total = sum(depths)
    flat = [rate * i / max(total - 1, 1) for i in range(total)]
    stages, start = [], 0
    for depth in depths:
        stages.append(flat[start : start + depth])
        start += depth
    return stages
