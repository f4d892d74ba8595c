"""The CPU implementation in C++."""

from pathlib import Path

import torch
from torch import Tensor

from zoo.ops._extension import Extension

EXTENSION = Extension("hgrn_scan", Path(__file__).with_name("hgrn_scan.cpp"))


def forward(f: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """As :func:`zoo.ops.hgrn_scan.vectorised.forward`."""
    start = None if initial_state is None else initial_state.contiguous()
    return torch.ops.zoo_cpu.hgrn_scan_forward(f.contiguous(), v.contiguous(), start)


def backward(grad: Tensor, f: Tensor, states: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.hgrn_scan.vectorised.backward`."""
    start = None if initial_state is None else initial_state.contiguous()
    return torch.ops.zoo_cpu.hgrn_scan_backward(grad.contiguous(), f.contiguous(), states.contiguous(), start)
