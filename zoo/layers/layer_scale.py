"""Layer scale: a learned factor for each channel of a residual branch."""

from typing import Any

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """``[..., dim] -> [..., dim]``. Source: arXiv:2103.17239.

    Args:
        dim: Channels.
        init: What every factor starts at; small, so that a deep network starts as nearly the identity.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its starting value."""
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerScale2d(LayerScale):
    """``[B, dim, H, W] -> [B, dim, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, 1, 1)


@torch.no_grad()
def fold_layer_scale(module: nn.Module, name: str, layer: Any) -> None:
    """Make ``layer``, a convolution or linear layer, do what the layer scale ``module.<name>`` after it does, in place.

    An identity takes the layer scale's place. The product is formed in float64, then rounded once.
    """
    scale = getattr(module, name)
    if not isinstance(scale, LayerScale):  # fused before
        return
    gamma = scale.gamma.double()
    layer.weight.copy_(layer.weight.double() * gamma.view(-1, *(1,) * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() * gamma)
    setattr(module, name, nn.Identity())
