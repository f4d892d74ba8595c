"""Where samples come from: class folders, parquet files, Hub data sets, and the ones embedded in the package.

A source knows how many samples it has, their labels and class names, and hands out *encoded* pictures; decoding is the
next stage (:mod:`zoo.data.image`).
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import DataError, nearest, reason, require

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EMBEDDED = Path(__file__).parent / "embedded"

# the folder names that a split goes by, the likeliest first
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation"),
    "val": ("val", "valid", "validation"),
    "validation": ("validation", "val", "valid"),
}
_SPLITS |= {"training": _SPLITS["train"], "valid": _SPLITS["val"]}


class ImageSource(ABC):
    """Labelled pictures in a fixed order.

    Attributes:
        classes: Class names; a label is an index into them.
        labels: ``[N]`` int64.
    """

    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The picture as its file's bytes."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where the picture is, for error messages."""


class FolderSource(ImageSource):
    """A folder of class folders: ``root/<class>/**/<picture>``. Classes are sorted by name, as torchvision does.

    Files and folders whose name starts with a dot are left out.

    Raises:
        DataError: If there is no class folder, or one holds no picture.
    """

    def __init__(self, root: Path) -> None:
        folders = _folders(root)
        if not folders:
            raise DataError(f"{root} has no class folders; expected {root}/<class name>/<pictures>.")
        self.classes = tuple(folder.name for folder in folders)
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(_pictures(folder))
            if not found:
                raise DataError(f"Class folder {folder} holds no pictures; remove it, or add some ({_suffixes()}).")
            self.paths += found
            labels += [label] * len(found)
        self.labels = np.asarray(labels, dtype=np.int64)

    def encoded(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read {self.paths[index]}: {error.strerror}.") from error

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class ParquetSource(ImageSource):
    """Parquet files in the Hub's layout: a column of ``{bytes, path}`` and a column of class indices.

    Class names come from the ``huggingface`` metadata that :mod:`datasets` writes; without it they are the numbers.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        parquet = require("pyarrow.parquet", extra="train", why="Reading parquet files")
        tables = []
        for file in files:
            try:
                tables.append(parquet.read_table(file))
            except Exception as error:  # pyarrow raises several unrelated types for a damaged file
                raise DataError(f"Cannot read {file} as parquet: {reason(error)}.") from error
        self.name = str(files[0].parent if len(files) > 1 else files[0])
        image, label = self._columns(tables[0])
        labels = np.concatenate([table.column(label).to_numpy() for table in tables])
        if labels.dtype.kind not in "iu":
            raise DataError(
                f"{self.name}: column {label!r} is {tables[0].schema.field(label).type}; expected integers."
            )
        self.labels = labels.astype(np.int64)
        self._images = [chunk for table in tables for chunk in table.column(image).chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._images])
        names = _class_names(tables[0].schema.metadata, label)
        self.classes = names or tuple(str(i) for i in range(int(self.labels.max(initial=-1)) + 1))
        _check_labels(self.labels, self.classes, self.name)

    def _columns(self, table: Any) -> tuple[str, str]:
        image = next((name for name in ("image", "img") if name in table.column_names), None)
        label = next((name for name in ("label", "labels", "fine_label") if name in table.column_names), None)
        if image is None or label is None:
            raise DataError(
                f"{self.name} has the columns {', '.join(table.column_names)}; expected 'image' or 'img', and 'label'."
            )
        kind = table.schema.field(image).type
        if not hasattr(kind, "get_field_index") or kind.get_field_index("bytes") < 0:
            raise DataError(f"{self.name}: column {image!r} is {kind}; expected the Hub's struct<bytes, path>.")
        return image, label

    def encoded(self, index: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._images[chunk][index - int(self._starts[chunk])]["bytes"].as_py()

    def describe(self, index: int) -> str:
        return f"{self.name}, row {index}"


class HubSource(ImageSource):
    """A data set of the Hugging Face Hub by name, read through :mod:`datasets` (its cache, its offline mode)."""

    def __init__(self, name: str, split: str) -> None:
        datasets = require("datasets", extra="train", why="Reading a Hub data set")
        try:
            data = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets wraps network, name and split mistakes in many types
            raise DataError(
                f"Cannot load data set {name!r}, split {split!r}: {reason(error)}. "
                "Check the name and the network, or pass a local copy as data.root=FOLDER."
            ) from error
        kinds = {column: type(feature).__name__ for column, feature in data.features.items()}
        image = next((column for column, kind in kinds.items() if kind == "Image"), None)
        label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
        if image is None or label is None:
            raise DataError(f"Data set {name!r} has {kinds}; expected an Image column and a ClassLabel column.")
        self.name = f"{name}[{split}]"
        self.classes = tuple(data.features[label].names)
        self.labels = np.asarray(data[label], dtype=np.int64)
        self._data, self._image = data.cast_column(image, datasets.Image(decode=False)), image
        _check_labels(self.labels, self.classes, self.name)

    def encoded(self, index: int) -> bytes:
        record = self._data[index][self._image]
        return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()

    def describe(self, index: int) -> str:
        return f"{self.name}, row {index}"


def open_source(name: str, *, split: str = "train", root: str = "") -> ImageSource:
    """Open a data set.

    Args:
        name: ``"digits"`` (embedded), a folder, a parquet file, or a Hub data set as ``"owner/name"``.
        split: ``"train"``, ``"test"``, ...; a folder without a subfolder or file for any split has ``"train"`` alone.
        root: A local copy that stands for ``name``: a folder of class folders, or of the Hub's parquet files.

    Raises:
        DataError: If it cannot be found or read, in one line that says what was expected.
    """
    embedded = sorted(path.stem for path in EMBEDDED.glob("*.parquet"))
    place = Path(root or name).expanduser()
    if not root and name in embedded:
        place = EMBEDDED / f"{name}.parquet"
    if place.is_file():
        if place.suffix != ".parquet":
            raise DataError(f"{place} is a file; expected a folder of class folders or a .parquet file.")
        if split != "train":
            raise DataError(f"{name!r} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")
        return ParquetSource([place])
    if place.is_dir():
        return _open_folder(place, split)
    if root:
        raise DataError(f"data.root is {root!r}, which is not there; expected a folder.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return HubSource(name, split)
    raise DataError(
        f"Unknown data set {name!r}.{nearest(name, embedded)} Expected one of {', '.join(embedded)}, a folder, "
        "a parquet file, or a Hub data set as owner/name."
    )


def _open_folder(root: Path, split: str) -> ImageSource:
    for folder in (root, root / "data"):
        files = sorted(folder.glob("*.parquet"))
        if files:
            chosen = [file for file in files if file.name.startswith(f"{split}-") or file.stem == split]
            if not chosen:
                splits = sorted({file.name.partition("-")[0].removesuffix(".parquet") for file in files})
                raise DataError(
                    f"{folder} has no split {split!r}.{nearest(split, splits)} It has: {', '.join(splits)}."
                )
            return ParquetSource(chosen)
    # A folder of class folders may be a split; a folder of pictures is a class, whatever its name.
    splits = [folder.name for folder in _folders(root) if folder.name in {split, *_SPLITS} and _folders(folder)]
    for name in _SPLITS.get(split, (split,)):
        if name in splits:
            return FolderSource(root / name)
    if splits:
        raise DataError(f"{root} has no split {split!r}.{nearest(split, splits)} It has: {', '.join(splits)}.")
    if split != "train":
        raise DataError(f"{root} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")
    return FolderSource(root)


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split sample indices into (train, held out), the same share of every class held out.

    Args:
        labels: ``[N]`` int64.
        fraction: Share to hold out, in (0, 1). Every class with two samples or more keeps and gives at least one; a
            single sample is kept for training.
        seed: Decides which.

    Raises:
        DataError: If there is nothing to hold out.
    """
    generator = np.random.default_rng([seed, 0x5EED])
    held_out = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:count])
    held = np.sort(np.concatenate(held_out))
    if not len(held):
        raise DataError(f"None of the {len(held_out)} classes has two samples, so that none can be held out.")
    return np.setdiff1d(np.arange(len(labels)), held), held


def _folders(root: Path) -> list[Path]:
    """The folders in ``root``, by name."""
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _check_labels(labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    if len(labels) == 0:
        raise DataError(f"{name} is empty.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{name} has labels {labels.min()} to {labels.max()}, but {len(classes)} class names.")


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
