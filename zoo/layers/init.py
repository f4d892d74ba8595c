"""Initialisation after the fact."""

from typing import Any

from torch import nn


def reset_parameters(module: nn.Module) -> None:
    """Initialise every parameter and buffer in place: children first, then the containers that correct them."""
    submodule: Any
    for submodule in reversed(list(module.modules())):
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()
