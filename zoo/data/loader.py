"""Batches: which samples, in which order, on which process, decoded and transformed. For pictures and text alike.

The order of an epoch is a permutation drawn from (seed, epoch). Each sample's augmentation is drawn from (seed, epoch,
sample), so it depends neither on the workers nor on the batch that the sample falls in. What all processes together
have consumed of an epoch is always a beginning of that order; hence an epoch goes on where it stopped on any number of
processes, without losing or repeating a sample.
"""

import dataclasses
import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from zoo.data.image import Patch, Transform
from zoo.data.pruning import Pruning
from zoo.data.slots import Parcel, Slots
from zoo.data.sources import ImageSource, StreamSource
from zoo.data.tokens import Rows
from zoo.errors import DataError, TrainingError, reason

_ATTEMPTS = 100  # pictures tried in place of one that cannot be read
_AHEAD = 2  # batches that a worker makes before they are asked for
_HELD = 3  # batches that the one who asks has at a time


@dataclass
class Batch:
    """One batch on its way to the model."""

    inputs: Tensor  # [B, 3, H, W] uint8 pictures, float32 once they are normalised; or [B, T] integers: tokens
    targets: Tensor  # [B] class indices, [B, num_classes] bool or float32 (several, mixed), or [B, T] tokens
    indices: Tensor  # [B] int64: which samples of the data set these are
    positions: Tensor | None = None  # [B, T] of each token in its document
    patches: tuple[Patch | None, ...] = ()  # for each picture, what erases a part of it
    skipped: dict[str, str] = field(default_factory=dict)  # what could not be read: where it is, and why

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which copies to a GPU need not be waited for."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """A copy on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        tensors: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


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


Key = tuple[int, int, int]  # (epoch, position in the data set, which of its repeats within the epoch)


class Samples(ABC):
    """What a :class:`Loader` draws batches from. The keys it is given hold one epoch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, keys: Sequence[Key], memory: Tensor | None = None) -> Batch:
        """The batch of these samples.

        Args:
            keys: Which.
            memory: ``[nbytes]`` uint8; where the pictures are put if they fit.

        Raises:
            DataError: If it cannot be read.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that the picture of a sample has at most."""
        return 0


class ImageSamples(Samples):
    """Chosen pictures of a source, decoded and transformed.

    Args:
        source: The pictures.
        indices: Which of them; a stream has all.
        transform: Its random numbers are drawn from (seed, epoch, sample).
        seed: See there.
        replace: Put another picture, drawn from the same numbers, in the place of one that cannot be read, as training
            needs batches of equal size; else it is left out, and a batch may be empty.
    """

    def __init__(
        self,
        source: ImageSource | StreamSource,
        indices: np.ndarray | None,
        transform: Transform,
        *,
        seed: int,
        replace: bool = False,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.replace = replace

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    @property
    def nbytes(self) -> int:
        return 3 * math.prod(self.transform.largest)

    def batch(self, keys: Sequence[Key], memory: Tensor | None = None) -> Batch:
        samples, positions, skipped = [], [], {}
        for epoch, position, repeat in keys:
            for attempt in range(_ATTEMPTS):
                try:
                    samples.append(self._load(epoch, position, repeat))
                    positions.append(position)
                    break
                except DataError as error:
                    skipped[self._describe(position)] = str(error)
                if not self.replace or isinstance(self.source, StreamSource):
                    break
                position = derive_seed(self.seed, epoch, position, attempt) % len(self)
        if not samples:  # nothing to make a batch of
            if self.replace:
                raise DataError(next(iter(skipped.values())))
            nothing = torch.empty(0, dtype=torch.int64)
            return Batch(nothing, nothing, nothing, skipped=skipped)
        pictures, patches, labels = zip(*samples, strict=True)
        # Pixel by pixel in memory, as they were decoded and as convolutions like them best.
        inputs = _stacked([picture.permute(1, 2, 0) for picture in pictures], memory).permute(0, 3, 1, 2)
        targets = torch.from_numpy(np.asarray(labels))
        return Batch(inputs, targets, torch.tensor(positions), patches=patches, skipped=skipped)

    def _describe(self, position: int) -> str:
        return self.source.describe(position if self.indices is None else int(self.indices[position]))

    def _load(self, epoch: int, position: int, repeat: int) -> tuple[Tensor, Patch | None, Any]:
        if isinstance(self.source, StreamSource):
            index = position
            data, label = self.source.sample(epoch, position)
        else:
            index = position if self.indices is None else int(self.indices[position])
            data, label = self.source.encoded(index), self.source.labels[index]
        seed = (self.seed, epoch, index, repeat) if repeat else (self.seed, epoch, index)
        if get_worker_info() is None:
            with seeded(*seed):
                return *self.transform.load(data, self.source.describe(index), epoch), label
        seed_everything(*seed)  # nobody else draws from a worker's generators
        return *self.transform.load(data, self.source.describe(index), epoch), label


class TextSamples(Samples):
    """Rows of tokens, to predict the next token of each."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, keys: Sequence[Key], memory: Tensor | None = None) -> Batch:
        chosen = [position for _, position, _ in keys]
        inputs, targets, positions = map(torch.from_numpy, self.rows.read(chosen))
        return Batch(inputs, targets, torch.tensor(chosen), positions)


class EpochSampler:
    """Yields the batches of one epoch as lists of keys, for one of ``world`` processes.

    Process r takes every ``world``-th sample of the epoch's order, from the r-th on; so what all have consumed after
    equal numbers of batches is a beginning of that order.

    Args:
        size: Samples in the data set.
        batch_size: Samples a batch and process.
        shuffle: Permute every epoch.
        drop_last: Drop the last, incomplete batch, so that all processes make equal steps; else every sample comes
            exactly once. By default as ``shuffle``.
        seed: Decides the permutations.
        rank, world: This process and how many there are.
        pruning: Leaves samples out.
        repeats: Times a sample comes in a row, varied anew each time; an epoch is as long as without, and has that part
            of the samples (repeated augmentation, arXiv:1902.05509). The repeats of one fall to different processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        pruning: Pruning | None = None,
        repeats: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = shuffle if drop_last is None else drop_last
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pruning = pruning
        self.repeats = repeats
        self.epoch = 0
        self.consumed = 0  # samples at the beginning of the epoch's order that are done, by all processes

    def set_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Choose the epoch to yield next, and how many of its samples all processes together have done already."""
        self.epoch, self.consumed = epoch, consumed
        if self.pruning is not None:
            self._kept = self.pruning.select(epoch)

    @property
    def epoch_size(self) -> int:
        """Samples that the epoch has, all processes together."""
        return self.size if self.pruning is None else len(self._kept)

    def __len__(self) -> int:
        each = (self.epoch_size - self.consumed) / (self.world * self.batch_size)
        return int(each) if self.drop_last else int(np.ceil(each))

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.arange(self.epoch_size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.epoch_size)
        if self.pruning is not None:
            order = self._kept[order]
        mine = np.arange(self.consumed + self.rank, self.epoch_size, self.world)
        for step in range(len(self)):
            chosen = mine[step * self.batch_size : (step + 1) * self.batch_size]
            if len(chosen):
                yield [(self.epoch, int(order[i // self.repeats]), int(i % self.repeats)) for i in chosen]


Request = tuple[list[Key], int | None]  # the samples of a batch, and the slot to bring their pictures in


class _Requests:
    """The sampler's batches as requests: what :class:`_Answers` is asked for."""

    def __init__(self, sampler: EpochSampler, slots: Slots | None) -> None:
        self.sampler = sampler
        self.slots = slots

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Request]:
        if self.slots is not None:
            self.slots.call_in()  # those of an epoch that was left in the middle; its answers have been thrown away
        for keys in self.sampler:
            yield keys, None if self.slots is None else self.slots.lend()


class _Answers(Dataset):
    """Answers requests with batches; an error is an answer too, as a worker's exception arrives as a traceback."""

    def __init__(self, samples: Samples, slots: Slots | None) -> None:
        self.samples = samples
        self.slots = slots

    def __getitems__(self, request: Request) -> Batch | DataError:
        keys, slot = request
        try:
            if self.slots is None or slot is None:
                return self.samples.batch(keys)
            memory = self.slots.memory_of(slot)
            batch = self.samples.batch(keys, memory)
        except DataError as error:
            return error
        if batch.inputs.data_ptr() != memory.data_ptr():
            return batch
        parcel: Any = Parcel(self.slots, slot, batch.inputs)
        return dataclasses.replace(batch, inputs=parcel)


class Loader:
    """Iterates over :class:`Batch`, empty ones left out; call :meth:`set_epoch` before each epoch of training.

    Attributes:
        skipped: What could not be read so far: where it is, and why.

    Args:
        samples: What batches are made of.
        sampler: Which samples, in which order.
        workers: Processes that make them.
        max_corrupt: How many samples may be unreadable before that is an error.
    """

    def __init__(self, samples: Samples, sampler: EpochSampler, *, workers: int = 0, max_corrupt: int = 0) -> None:
        self.samples = samples
        self.sampler = sampler
        self.max_corrupt = max_corrupt
        self.skipped: dict[str, str] = {}
        forked = workers > 0 and sys.platform == "linux"
        nbytes = sampler.batch_size * samples.nbytes
        self._slots: Slots | None = None
        if forked and nbytes:
            with suppress(OSError):  # more than the system grants at once: batches come in memory of their own
                self._slots = Slots(_AHEAD * workers + _HELD, nbytes)
        self._loader: DataLoader = DataLoader(
            _Answers(samples, self._slots),
            batch_sampler=_Requests(sampler, self._slots),  # type: ignore[arg-type]  # asked for: a Sampler
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Not forkserver, Python 3.14's default: it pickles the data set for every worker, and its workers outlive a
            # training process that was killed.
            multiprocessing_context="fork" if forked else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or each epoch would draw a number from torch's global one
        )

    def set_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Choose the epoch, and how many of its samples all processes together have done already."""
        self.sampler.set_epoch(epoch, consumed)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        some, unread = False, ""
        while True:
            with dead_workers_named():
                batch = next(batches, None)
            if batch is None:
                break
            if isinstance(batch, DataError):
                raise batch
            self._count(batch.skipped)
            if len(batch.indices):
                some = True
                yield batch
            else:
                unread = next(iter(batch.skipped.values()))
        if unread and not some:
            raise DataError(f"Not one sample could be read. {unread}")
        if self._slots is not None:
            self._slots.give_memory_back()  # to the loader whose turn is next

    def _count(self, skipped: dict[str, str]) -> None:
        if not skipped:
            return
        self.skipped |= skipped
        if len(self.skipped) > self.max_corrupt:
            last = list(skipped.values())[-1]
            if not self.max_corrupt:
                raise DataError(f"{last} data.max_corrupt=10 would skip up to ten such, and list them in the report.")
            raise DataError(
                f"{len(self.skipped)} samples cannot be read, data.max_corrupt allows {self.max_corrupt}. {last}"
            )

    def close(self) -> None:
        """End the worker processes, which otherwise wait for the next epoch. The loader is of no use afterwards."""
        del self._loader


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """For what happens between batches too: torch tells of a dead worker wherever the process is just then.

    Raises:
        TrainingError: If a worker of a loader died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"A data worker died: {reason(error)}. Most often memory ran out: lower data.workers. A training goes on "
            "from its last checkpoint with --resume auto."
        ) from error


def _stacked(tensors: list[Tensor], memory: Tensor | None) -> Tensor:
    """``torch.stack`` of uint8, into ``memory`` if there is enough."""
    count = len(tensors) * tensors[0].numel()
    if memory is None or count > len(memory):
        return torch.stack(tensors)
    return torch.stack(tensors, out=memory[:count].view(len(tensors), *tensors[0].shape))


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    report = sys.excepthook

    def report_unless_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The thread that hands tensors over says so when the training process is interrupted meanwhile: no news."""
        if not issubclass(kind, EOFError | ConnectionError):
            report(kind, error, trace)

    sys.excepthook = report_unless_alone
