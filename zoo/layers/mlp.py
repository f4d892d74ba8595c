"""The feed-forward part of a transformer block."""

from torch import nn

from zoo.layers.linear import TruncNormalLinear


class Mlp(nn.Sequential):
    """Two linear layers with GELU between: ``[..., dim] -> [..., dim]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = TruncNormalLinear(hidden, dim)
