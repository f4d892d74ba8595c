"""The CPU implementation in C++."""

from pathlib import Path

import torch
from torch import Tensor

from zoo.ops._extension import Extension

EXTENSION = Extension("selective_scan", Path(__file__).with_name("selective_scan.cpp"))


def _strided(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors as the kernel takes them: vectors and matrices contiguous, sequences as they are."""
    return [x if x is None or x.ndim > 2 else x.contiguous() for x in tensors]


def forward(*inputs: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.selective_scan.vectorised.forward`."""
    return torch.ops.zoo_cpu.selective_scan_forward(*_strided(*inputs), delta_softplus)


def backward(
    grad_y: Tensor, grad_last_state: Tensor | None, *inputs: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, ...]:
    """As :func:`zoo.ops.selective_scan.vectorised.backward`; gradients of tensors that are not there mean nothing."""
    grad_last_state = None if grad_last_state is None else grad_last_state.contiguous()
    return torch.ops.zoo_cpu.selective_scan_backward(grad_y, grad_last_state, *_strided(*inputs), delta_softplus)
