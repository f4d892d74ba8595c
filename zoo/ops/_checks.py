"""What operators check of their tensors, and the dtype that they compute in."""

from typing import Any

import torch
from torch import Tensor

from zoo.errors import ShapeError


def show(x: Tensor) -> str:
    """A tensor's shape, for an error."""
    return str(list(x.shape))


def check_tensors(operator: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ShapeError unless all the tensors that are there are real, floating-point and on ``device``."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.is_complex():
            raise ShapeError(f"{name} is complex; {operator} takes real tensors only.")
        if not x.is_floating_point():
            raise ShapeError(f"{name} is {x.dtype}; expected a floating-point tensor.")
        if x.device != device:
            raise ShapeError(f"{name} is on {x.device} and {next(iter(tensors))} on {device}; expected one device.")


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """Tensors in ``dtype``; those that are there."""
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]  # a call that does nothing takes time
