"""What every source of pictures has."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.errors import DataError, nearest

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EMBEDDED = Path(__file__).parents[1] / "embedded"
_NUMBERED = 1_000_000  # most classes that have no names


class ImageSource(ABC):
    """Labelled pictures in a fixed order.

    Attributes:
        classes: Class names; a label is an index into them.
        labels: ``[N]`` int64; or, where a picture may have several or none, ``[N, len(classes)]`` bool.
    """

    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a picture may have several labels."""
        return self.labels.ndim == 2

    def class_names_of(self, index: int) -> list[str]:
        """The names of a picture's labels."""
        label = self.labels[index]
        return [self.classes[i] for i in np.flatnonzero(label)] if self.multi_label else [self.classes[int(label)]]

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The picture as its file's bytes.

        Raises:
            DataError: If it cannot be read.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where the picture is, for error messages."""


class Relabelled(ImageSource):
    """A source with its labels in the class order of another, matched by class name.

    Raises:
        DataError: If this source has a class that the other has not.
    """

    def __init__(self, source: ImageSource, classes: tuple[str, ...], name: str) -> None:
        strange = [each for each in source.classes if each not in classes]
        if strange:
            raise DataError(
                f"{name} has the class {strange[0]!r}, which the training data has not.{nearest(strange[0], classes)}"
            )
        indices = {each: i for i, each in enumerate(classes)}
        order = np.asarray([indices[each] for each in source.classes], dtype=np.int64)
        self.source, self.classes = source, classes
        if source.multi_label:
            self.labels = np.zeros((len(source), len(classes)), dtype=bool)
            self.labels[:, order] = source.labels
        else:
            self.labels = order[source.labels]

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many pictures each class has, ``[num_classes]`` int64; ``labels`` as an :class:`ImageSource` has them."""
    return labels.sum(0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)


def missing_classes(labels: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """The classes that no picture has; ``labels`` as an :class:`ImageSource` has them."""
    return [classes[i] for i in np.flatnonzero(class_counts(labels, len(classes)) == 0)]


def members_of(labels: np.ndarray, label: int) -> np.ndarray:
    """Indices of the pictures of a class."""
    return np.flatnonzero(labels[:, label] if labels.ndim == 2 else labels == label)


def check_labels(labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    """Raise :class:`DataError` if there are no labels, or one is no index into ``classes``."""
    if len(labels) == 0:
        raise DataError(f"{name} is empty.")
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = int(np.argmax((labels < 0) | (labels >= len(classes))))
        raise wrong_label(f"{name}: sample {wrong}", labels[wrong], classes)


def wrong_label(where: str, label: int, classes: tuple[str, ...]) -> DataError:
    """The error of a sample whose label is none of the classes' indices."""
    last = len(classes) - 1
    return DataError(f"{where} has the label {label}; expected 0 to {last}, as there are {len(classes)} classes.")


def numbered_classes(labels: np.ndarray, where: str) -> tuple[str, ...]:
    """The names of classes that have none: their numbers.

    Raises:
        DataError: If a number is so high that it can be no index.
    """
    highest = int(labels.max(initial=-1))
    if highest >= _NUMBERED:
        raise DataError(f"{where} has the label {highest}; expected indices from 0 on, fewer than {_NUMBERED:,}.")
    return tuple(str(i) for i in range(highest + 1))


def labels_and_classes(values: Sequence[str], names: Sequence[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as text -> ``[N]`` int64 and class names.

    Whole numbers are indices into ``names``, or name themselves where there are none; other texts are class names,
    whose order is that of ``names``, or else alphabetical.

    Raises:
        DataError: If an index is out of range or a class is not among ``names``.
    """
    if values and all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in values):
        labels = np.asarray([int(value) for value in values], dtype=np.int64)
        classes = tuple(names) or numbered_classes(labels, where)
    else:
        classes = tuple(names) or tuple(sorted(set(values)))
        order = {name: i for i, name in enumerate(classes)}
        for i, value in enumerate(values):
            if value not in order:
                raise DataError(f"{where}: sample {i} has the class {value!r}.{nearest(value, classes)}")
        labels = np.asarray([order[value] for value in values], dtype=np.int64)
    check_labels(labels, classes, where)
    return labels, classes


def label_sets_and_classes(
    values: Sequence[Sequence[str]], names: Sequence[str], where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Several labels a picture, as text -> ``[N, len(classes)]`` bool and class names.

    Errors, and what texts mean, are those of :func:`labels_and_classes`.
    """
    if not any(values):
        raise DataError(f"{where} gives no picture a label.")
    rows = np.repeat(np.arange(len(values)), [len(each) for each in values])
    flat, classes = labels_and_classes([value for each in values for value in each], names, where)
    labels = np.zeros((len(values), len(classes)), dtype=bool)
    labels[rows, flat] = True
    return labels, classes
