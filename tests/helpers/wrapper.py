"""A module around another."""

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """As LoRA, a compiler or a sharding library puts around a part of a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)
