"""Batches: which samples, in which order, on which process, decoded and transformed.

The order of an epoch is a permutation drawn from (seed, epoch). Each sample's augmentation is drawn from (seed, epoch,
sample), so it depends neither on the workers nor on the batch that the sample falls in.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from zoo.data.image import Transform, decode_image
from zoo.data.sources import ImageSource
from zoo.errors import DataError


@dataclass
class Batch:
    """One batch on its way to the model."""

    inputs: Tensor  # [B, C, H, W] float32
    targets: Tensor  # [B] int64 class indices, or [B, num_classes] float32 after mixing

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which copies to a GPU need not be waited for."""
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory())

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Batch":
        """A copy on ``device``."""
        layout = torch.channels_last if channels_last and self.inputs.ndim == 4 else torch.preserve_format
        inputs = self.inputs.to(device, non_blocking=True, memory_format=layout)
        return Batch(inputs, self.targets.to(device, non_blocking=True))


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, well mixed: equal parts give equal seeds on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators from ``parts``; cheap enough to do for every sample."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """:func:`seed_everything` for the length of a block; the CPU generators' states are put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(*parts)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ImageDataset(Dataset):
    """Chosen samples of a source, decoded and transformed. Indexed by ``(epoch, position)``."""

    def __init__(self, source: ImageSource, indices: np.ndarray, transform: Transform, *, seed: int) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> "tuple[Tensor, int] | DataError":
        epoch, position = key
        index = int(self.indices[position])
        if get_worker_info() is None:
            with seeded(self.seed, epoch, index):
                return self._load(index)
        seed_everything(self.seed, epoch, index)  # nobody else draws from a worker's generators
        try:
            return self._load(index)
        except DataError as error:
            return error  # handed over as a value: a worker's exception arrives with its traceback as the message

    def _load(self, index: int) -> tuple[Tensor, int]:
        picture = decode_image(self.source.encoded(index), self.source.describe(index))
        return self.transform(picture), int(self.source.labels[index])


class EpochSampler:
    """Yields the batches of one epoch as lists of ``(epoch, position)``, for one of ``world`` processes.

    Args:
        size: Samples in the data set.
        batch_size: Samples a batch and process.
        shuffle: Permute every epoch, and drop the last, incomplete batch so that all processes make equal steps.
            Without it, samples keep their order and every one comes exactly once.
        seed: Decides the permutations.
        rank, world: This process and how many there are.
    """

    def __init__(
        self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0  # batches of the epoch to leave out, when resuming in mid-epoch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to yield next, and how many of its batches are done already."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        per_process = self.size / self.world
        count = int(per_process // self.batch_size) if self.shuffle else int(np.ceil(per_process / self.batch_size))
        return count - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        mine = order[self.rank :: self.world]
        for step in range(self.start, self.start + len(self)):
            chosen = mine[step * self.batch_size : (step + 1) * self.batch_size]
            if len(chosen):
                yield [(self.epoch, int(position)) for position in chosen]


class Loader:
    """Iterates over :class:`Batch`; call :meth:`set_epoch` before each epoch of training."""

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, *, workers: int = 0) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # torch asks for a Sampler only in its annotation
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Not forkserver, Python 3.14's default: it pickles the data set for every worker, and its workers outlive a
            # training process that was killed.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # or each epoch would draw a number from torch's global one
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the number of its batches to leave out."""
        self.sampler.set_epoch(epoch, start)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the worker processes, which otherwise wait for the next epoch. The loader is of no use afterwards."""
        del self._loader


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> Batch | DataError:
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return Batch(torch.stack(images), torch.tensor(labels))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
