"""Global pooling."""

from torch import Tensor, nn


class GlobalPool(nn.Module):
    """``[B, C, H, W] -> [B, C]`` by mean (``"avg"``) or maximum (``"max"``); ``""`` leaves the map as it is."""

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_type == "avg":
            return x.mean((2, 3))
        if self.pool_type == "max":
            return x.amax((2, 3))
        return x

    def extra_repr(self) -> str:
        return repr(self.pool_type)
