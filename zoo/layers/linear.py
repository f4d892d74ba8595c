"""Linear layers."""

from typing import Any

import torch
from torch import nn


class TruncNormalLinear(nn.Linear):
    """A linear layer that starts as vision transformers' do: truncated normal of std 0.02, zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PointLinear(nn.Linear):
    """A linear layer that sees one position of each image, ``[B, Cin] -> [B, Cout]``."""


@torch.no_grad()
def as_linear(conv: Any) -> PointLinear:
    """The linear layer that does what a 1x1 convolution does at one position, on the same bias."""
    weight = conv.weight.flatten(1)
    linear = PointLinear(weight.shape[1], weight.shape[0], bias=conv.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), conv.bias
    return linear.train(conv.training)
