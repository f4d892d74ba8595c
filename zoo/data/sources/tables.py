"""Pictures in tables: parquet files, and data sets of the Hugging Face Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.sources.base import ImageSource, check_labels, numbered_classes
from zoo.errors import DataError, reason, require


class ParquetSource(ImageSource):
    """Parquet files in the Hub's layout: a column of ``{bytes, path}`` and a column of class indices.

    Class names come from the ``huggingface`` metadata that :mod:`datasets` writes; without it they are the numbers.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        tables = [read_parquet(file) for file in files]
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
        self.classes = names or numbered_classes(self.labels, self.name)
        check_labels(self.labels, self.classes, self.name)

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
        data = load_hub(name, split)
        image, label = image_columns(data.features, name)
        self.name = f"{name}[{split}]"
        self.classes = tuple(data.features[label].names)
        self.labels = np.asarray(data[label], dtype=np.int64)
        self._data, self._image = undecoded(data, image), image
        check_labels(self.labels, self.classes, self.name)

    def encoded(self, index: int) -> bytes:
        return picture_bytes(self._data[index][self._image])

    def describe(self, index: int) -> str:
        return f"{self.name}, row {index}"


def read_parquet(file: Path) -> Any:
    """A parquet file as a :class:`pyarrow.Table`.

    Raises:
        DataError: If it is damaged.
    """
    parquet = require("pyarrow.parquet", extra="train", why="Reading parquet files")
    try:
        return parquet.read_table(file)
    except Exception as error:  # pyarrow raises several unrelated types for a damaged file
        raise DataError(f"Cannot read {file} as parquet: {reason(error)}.") from error


def load_hub(name: str, split: str, **options: Any) -> Any:
    """``datasets.load_dataset`` whose many kinds of failure are one :class:`DataError`."""
    datasets = require("datasets", extra="train", why="Reading a Hub data set")
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # datasets wraps network, name and split mistakes in many types
        raise DataError(
            f"Cannot load data set {name!r}, split {split!r}: {reason(error)}. "
            "Check the name and the network, or pass a local copy as data.root=FOLDER."
        ) from error


def image_columns(features: Mapping[str, Any] | None, name: str) -> tuple[str, str]:
    """Names of the picture column and the label column among a data set's features."""
    kinds = {column: type(feature).__name__ for column, feature in (features or {}).items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
    if image is None or label is None:
        raise DataError(f"Data set {name!r} has {kinds}; expected an Image column and a ClassLabel column.")
    return image, label


def undecoded(data: Any, image: str) -> Any:
    """The data set with its pictures left as files' bytes."""
    return data.cast_column(image, require("datasets", extra="train", why="Reading a Hub data set").Image(decode=False))


def picture_bytes(record: Mapping[str, Any]) -> bytes:
    """The bytes of an undecoded picture, wherever :mod:`datasets` keeps them."""
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
