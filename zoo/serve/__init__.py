"""Serving language models: many sequences at once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.serve.depth_batcher import DepthBatcher, Generated

__all__ = ["DepthBatcher", "Generated"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("zoo.serve.depth_batcher"), name)
    raise AttributeError(f"module 'zoo.serve' has no attribute {name!r}")
