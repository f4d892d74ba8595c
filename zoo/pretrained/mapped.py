"""The tensors of a safetensors file, mapped into memory where that is harmless and read where it is not."""

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
_ALIGNMENT = 64  # bytes, as torch aligns its own tensors


def map_tensors(path: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, in memory of this process alone: writing to them leaves the file as it is.

    A file holds its tensors at any address, and products of matrices and vectors round differently where the matrix
    does not start on a boundary of 16 bytes. So only the kernels of convolutions stay in the file, most of what there
    is to read; all else is read, onto boundaries of 64 bytes. oneDNN rearranges kernels before it uses them, except on
    maps of a pixel or so, where such a product is what they are: there the last bit can still depend on the address.

    Args:
        path: The file. Nobody may write to it while the tensors are in use.
        header: What :func:`zoo.pretrained.files.read_header` says of it; known to describe the file.

    Raises:
        WeightsError: For a dtype that zoo does not use.
        OSError: If it cannot be read.
    """
    entries = [(name, entry, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda each: each[2])
    if other := next((name for name, entry, *_ in entries if entry["dtype"] not in _DTYPES), None):
        raise WeightsError(
            f"{path}: {other} is of dtype {header[other]['dtype']}; expected one of {', '.join(_DTYPES)}."
        )
    start = path.stat().st_size - (entries[-1][3] if entries else 0)
    stay = {name for name, entry, begin, _ in entries if _stays(entry, start + begin)}
    inside = _Typed(np.memmap(path, np.uint8, "c"))
    outside = _Typed(_aligned(sum(_padded(end - begin) for name, _, begin, end in entries if name not in stay)))
    tensors: dict[str, Tensor] = {}
    place, position = 0, 0
    with path.open("rb") as file:
        for name, entry, begin, end in entries:
            if name in stay:
                tensors[name] = inside.tensor(entry, start + begin)
                continue
            if position != start + begin:
                file.seek(start + begin)
            file.readinto(outside.bytes[place : place + end - begin])
            position = start + end
            tensors[name] = outside.tensor(entry, place)
            place += _padded(end - begin)
    return tensors


def _stays(entry: Mapping[str, Any], address: int) -> bool:
    """Whether a tensor stays where it is in the file."""
    return len(entry["shape"]) == 4 and address % _DTYPES[entry["dtype"]].itemsize == 0


def _padded(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


class _Typed:
    """Memory as tensors of any dtype."""

    def __init__(self, memory: np.ndarray) -> None:
        self.bytes = memory.data
        self._memory = torch.from_numpy(memory)
        self._views: dict[str, tuple[Tensor, int]] = {}

    def tensor(self, entry: Mapping[str, Any], place: int) -> Tensor:
        """The tensor whose first byte is there."""
        kind, shape = entry["dtype"], entry["shape"]
        if kind not in self._views:
            size = _DTYPES[kind].itemsize
            self._views[kind] = self._memory[: len(self._memory) // size * size].view(_DTYPES[kind]), size
        view, size = self._views[kind]
        strides, stride = [], 1
        for length in reversed(shape):
            strides.append(stride)
            stride *= length
        return view.as_strided(shape, strides[::-1], place // size)


def _aligned(size: int) -> np.ndarray:
    """Uninitialised bytes on such a boundary. By numpy, which asks for large pages: they cost a third of small ones."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size]
