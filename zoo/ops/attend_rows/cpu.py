"""The CPU implementation in C++."""

from pathlib import Path

import torch
from torch import Tensor

from zoo.ops._extension import Extension

EXTENSION = Extension("attend_rows", Path(__file__).with_name("attend_rows.cpp"))


def forward(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """As :func:`zoo.ops.attend_rows.attend_rows`."""
    return torch.ops.zoo_cpu.attend_rows(q.contiguous(), keys, values, rows.contiguous(), counts.contiguous())
