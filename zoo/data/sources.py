"""Where samples come from: class folders, parquet files, Hub data sets, and the ones embedded in the package.

A source knows how many samples it has, their labels and class names, and hands out *encoded* pictures; decoding is the
next stage (:mod:`zoo.data.image`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import DataError, nearest, require

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EMBEDDED = Path(__file__).parent / "embedded"


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

    Raises:
        DataError: If there is no class folder, or one holds no picture.
    """

    def __init__(self, root: Path) -> None:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise DataError(f"{root} has no class folders; expected {root}/<class name>/<pictures>.")
        self.classes = tuple(folder.name for folder in folders)
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
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
        try:
            tables = [parquet.read_table(file) for file in files]
        except Exception as error:  # pyarrow raises several unrelated types for a damaged file
            raise DataError(f"Cannot read {files[0]} as parquet: {str(error).splitlines()[0]}.") from error
        self.name = str(files[0].parent if len(files) > 1 else files[0])
        image, label = self._columns(tables[0])
        self.labels = np.concatenate([table.column(label).to_numpy() for table in tables]).astype(np.int64)
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
                f"Cannot load data set {name!r}, split {split!r}: {str(error).splitlines()[0]} "
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
    embedded = EMBEDDED / f"{name}.parquet"
    place = Path(root).expanduser() if root else embedded if embedded.is_file() else Path(name).expanduser()
    if place.is_file():
        if place != embedded and place.suffix != ".parquet":
            raise DataError(f"{place} is a file; expected a folder of class folders or a .parquet file.")
        if split != "train":
            raise DataError(f"{name!r} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")
        return ParquetSource([place])
    if place.is_dir():
        return _open_folder(place, split)
    if root:
        raise DataError(f"data.root is {root!r}, which is not there; expected a folder.")
    if "/" in name and not name.startswith((".", "/", "~")):
        return HubSource(name, split)
    known = sorted(path.stem for path in EMBEDDED.glob("*.parquet"))
    raise DataError(
        f"Unknown data set {name!r}.{nearest(name, known)} Expected one of {', '.join(known)}, a folder, "
        "or a Hub data set as owner/name."
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
    names = {"train": ("train",), "test": ("test", "val", "validation"), "validation": ("validation", "val")}
    for name in names.get(split, (split,)):
        if (root / name).is_dir():
            return FolderSource(root / name)
    if split != "train":
        raise DataError(f"{root} has no folder for the split {split!r}; hold a part of it out with data.holdout.")
    return FolderSource(root)


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split sample indices into (train, held out), the same share of every class held out.

    Args:
        labels: ``[N]`` int64.
        fraction: Share to hold out, in (0, 1). Every class with two samples or more keeps and gives at least one.
        seed: Decides which.
    """
    generator = np.random.default_rng([seed, 0x5EED])
    held_out = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:count])
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held


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
