"""Pictures that arrive one after another: Hub data sets that are not downloaded first."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from zoo.data.sources.base import wrong_label
from zoo.data.sources.tables import image_columns, picture_bytes, undecoded
from zoo.errors import DataError

_BUFFER = 1000  # records among which a stream is shuffled


class Cursor:
    """Random access that only ever goes forward: record ``position`` of epoch ``epoch`` of a :mod:`datasets` stream.

    The samplers ask every worker for ever later positions, so a stream is shuffled, shared out and resumed by the same
    samplers as data at rest; what lies between two positions is read and dropped, undecoded.

    Args:
        data: An ``IterableDataset``.
        seed: Shuffles through a buffer, differently in every epoch; None keeps the order.
    """

    def __init__(self, data: Any, *, seed: int | None) -> None:
        self._data, self._seed = data, seed
        self._iterator: Iterator[Any] = iter(())
        self._epoch, self._next = -1, 0

    def record(self, epoch: int, position: int) -> Any:
        """The record; going back starts the epoch again.

        Raises:
            IndexError: If the stream ends before it.
        """
        if epoch != self._epoch or position < self._next:
            self._iterator, self._epoch, self._next = self._start(epoch), epoch, 0
        for record in self._iterator:
            self._next += 1
            if self._next > position:
                return record
        raise IndexError(position)

    def _start(self, epoch: int) -> Iterator[Any]:
        # Not iter(data): in a worker process that would leave out what it takes for the other workers' part.
        batches = self._data.iter(batch_size=1)
        records = ({column: values[0] for column, values in batch.items()} for batch in batches)
        if self._seed is None:
            return records
        return _shuffled(records, np.random.default_rng([self._seed, epoch]))


def _shuffled(records: Iterator[Any], generator: np.random.Generator) -> Iterator[Any]:
    """Each record comes at a random time after it entered the buffer. Not ``data.shuffle``, whose order is nobody's
    promise and which sleeps for seconds at the end of every epoch."""
    buffer: list[Any] = []
    for record in records:
        if len(buffer) < _BUFFER:
            buffer.append(record)
            continue
        chosen = int(generator.integers(_BUFFER))
        yield buffer[chosen]
        buffer[chosen] = record
    yield from (buffer[i] for i in generator.permutation(len(buffer)))


class StreamSource:
    """A stream of labelled pictures.

    Attributes:
        classes: Class names.

    Args:
        data: An ``IterableDataset`` with an Image and a ClassLabel column.
        name: For error messages.
        size: Pictures in an epoch; the stream's own count if it knows one.
        seed: As for :class:`Cursor`.
    """

    def __init__(self, data: Any, name: str, *, size: int = 0, seed: int | None = None) -> None:
        self._image, self._label = image_columns(data.features, name)
        self.classes = tuple(data.features[self._label].names)
        self.name = name
        self._size = size or stream_size(data, name)
        self._cursor = Cursor(undecoded(data, self._image), seed=seed)

    def __len__(self) -> int:
        return self._size

    def sample(self, epoch: int, position: int) -> tuple[bytes, int]:
        """Encoded picture and label."""
        try:
            record = self._cursor.record(epoch, position)
        except IndexError as error:
            raise DataError(
                f"{self.describe(position)} is not there: the stream has fewer than {self._size}."
            ) from error
        label = record[self._label]
        if not 0 <= label < len(self.classes):
            raise wrong_label(self.describe(position), label, self.classes)
        return picture_bytes(record[self._image]), label

    def describe(self, position: int) -> str:
        return f"{self.name}, row {position} of the stream"


def stream_size(data: Any, name: str) -> int:
    """Records in a stream, if its Hub page says so.

    Raises:
        DataError: If it does not.
    """
    splits = getattr(data.info, "splits", None) or {}
    count = getattr(splits.get(str(data.split)), "num_examples", 0)
    if not count:
        raise DataError(f"{name} does not say how many records it has; set data.samples.")
    return int(count)
