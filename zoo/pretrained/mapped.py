"""The tensors of a safetensors file, mapped into memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import WeightsError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def map_tensors(path: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, in memory of this process alone: writing to them leaves the file as it is.

    A file holds its tensors at any address, and some products of a matrix and a single vector round differently in the
    last bit where the matrix does not start on a boundary of 16 bytes.

    Args:
        path: The file. Nobody may write to it while the tensors are in use.
        header: What :func:`zoo.pretrained.files.read_header` says of it; known to describe the file.

    Raises:
        WeightsError: For a dtype that zoo does not use.
        OSError: If it cannot be read.
    """
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if other := next((name for name, entry in entries.items() if entry["dtype"] not in _DTYPES), None):
        raise WeightsError(
            f"{path}: {other} is of dtype {entries[other]['dtype']}; expected one of {', '.join(_DTYPES)}."
        )
    start = path.stat().st_size - max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    memory = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    views = {
        kind: memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype) for kind, dtype in _DTYPES.items()
    }
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        view, shape = views[entry["dtype"]], entry["shape"]
        if (start + begin) % view.itemsize:  # no tensor can be there; zoo and safetensors put none
            tensors[name] = memory[start + begin : start + end].clone().view(view.dtype).view(shape)
            continue
        strides, stride = [], 1
        for length in reversed(shape):
            strides.append(stride)
            stride *= length
        tensors[name] = view.as_strided(shape, strides[::-1], (start + begin) // view.itemsize)
    return tensors
