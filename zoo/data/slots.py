"""The memory in which worker processes hand pictures over."""

import itertools
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, "Slots"] = weakref.WeakValueDictionary()


class Slots:
    """Shared memory for a number of batches, used again and again: make it before the workers are started.

    Sending a tensor through torch's queues takes fresh memory for each, and the system takes longer to find its pages
    than a worker takes to fill them.

    A slot is free again when the last tensor over it is gone, however long somebody keeps one.

    Args:
        count: Batches.
        nbytes: Of the largest batch.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.nbytes = math.ceil(nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, count * self.nbytes)
        self._free = list(range(count))  # the last one used is the first to be used again: it may be in the caches
        self._lent: set[int] = set()  # to workers
        self.number = next(_numbers)
        _open[self.number] = self

    def lend(self) -> int | None:
        """A free slot for a worker to fill; None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._lent.add(slot)
        return slot

    def call_in(self) -> None:
        """Free the slots that were lent and have not come back. To be called while no worker fills one."""
        self._free += self._lent
        self._lent.clear()

    def give_memory_back(self) -> None:
        """Give the system the memory of the free slots, until they are used again."""
        for slot in self._free:
            self.memory.madvise(mmap.MADV_REMOVE, slot * self.nbytes, self.nbytes)

    def memory_of(self, slot: int) -> Tensor:
        """``[nbytes]`` uint8, for the worker to put its batch into."""
        return torch.from_numpy(self._array(slot, self.nbytes))

    def receive(self, slot: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """What a worker has put into a slot, which is free again when this tensor and all views of it are gone."""
        array = self._array(slot, math.prod(shape))
        self._lent.discard(slot)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array).as_strided(shape, strides)

    def _array(self, slot: int, nbytes: int) -> np.ndarray:
        return np.frombuffer(self.memory, np.uint8, nbytes, slot * self.nbytes)


class Parcel:
    """A uint8 tensor in a slot, dense, on its way from a worker: the process that lent the slot unpacks a tensor."""

    def __init__(self, slots: Slots, slot: int, tensor: Tensor) -> None:
        self.content = slots.number, slot, tuple(tensor.shape), tensor.stride()

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, self.content


def _receive(number: int, slot: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    return _open[number].receive(slot, shape, strides)
