"""Pictures in files of their own: class folders, and manifests that list them."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zoo.data.sources.base import (
    IMAGE_SUFFIXES,
    ImageSource,
    label_sets_and_classes,
    labels_and_classes,
    read_bytes,
)
from zoo.errors import DataError, nearest, reason

_PATH_COLUMNS = ("path", "image", "file", "file_name", "filename")
_LABEL_COLUMNS = ("label", "class", "target")
_LABELS_COLUMN, _SEPARATOR = "labels", "|"  # of several labels a picture
MANIFEST_SUFFIXES = {".csv", ".tsv", ".jsonl"}


class FolderSource(ImageSource):
    """A folder of class folders: ``root/<class>/**/<picture>``. Classes are sorted by name, as torchvision does.

    Files and folders whose name starts with a dot are left out.

    Raises:
        DataError: If there is no class folder, or one holds no picture.
    """

    def __init__(self, root: Path) -> None:
        folders = subfolders(root)
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
        return read_bytes(self.paths[index])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class ManifestSource(ImageSource):
    """A CSV, TSV or JSONL file that lists pictures: a column ``path``, a column ``label``, and perhaps ``split``.

    Paths are relative to the file's folder. Labels are class names or indices; ``classes.txt`` beside the file, a name
    a line, gives indices their names and names their order. A column ``labels`` instead of ``label`` gives each picture
    several of them, or none: a list in JSONL, ``cat|dog`` in CSV and TSV.

    Args:
        file: The manifest.
        split: Which rows, by their ``split``; a manifest without that column has ``"train"`` alone.

    Raises:
        DataError: If the file cannot be parsed, lacks a column, or a row lacks a value; names the row.
    """

    def __init__(self, file: Path, split: str = "train") -> None:
        rows = _rows(file)
        if not rows:
            raise DataError(f"{file} lists no pictures.")
        columns = list(rows[0])
        path = next((name for name in _PATH_COLUMNS if name in columns), None)
        label = next((name for name in (_LABELS_COLUMN, *_LABEL_COLUMNS) if name in columns), None)
        if path is None or label is None:
            raise DataError(f"{file} has the columns {', '.join(columns)}; expected 'path', and 'label' or 'labels'.")
        several = label == _LABELS_COLUMN
        for i, row in enumerate(rows):
            for column in (path,) if several else (path, label):
                if row.get(column) in (None, ""):
                    raise DataError(f"{file}: row {i + 1} has no {column}.")
            if not several and isinstance(row[label], list):
                raise DataError(
                    f"{file}: row {i + 1} has a list for its {label}; several labels are expected in a column "
                    f"{_LABELS_COLUMN!r}."
                )
        # All splits count for the classes, so that a label means the same in each.
        classes = read_classes(file.parent)
        if several:
            values = [_several(row.get(label), f"{file}: row {i + 1}") for i, row in enumerate(rows)]
            labels, self.classes = label_sets_and_classes(values, classes, str(file))
        else:
            labels, self.classes = labels_and_classes([str(row[label]) for row in rows], classes, str(file))
        splits = [str(row.get("split") or "train") for row in rows]
        if split not in splits:
            known = sorted(set(splits))
            raise DataError(f"{file} has no split {split!r}.{nearest(split, known)} It has: {', '.join(known)}.")
        chosen = [i for i, each in enumerate(splits) if each == split]
        self.paths = [file.parent / str(rows[i][path]) for i in chosen]
        self.labels = labels[chosen]

    def encoded(self, index: int) -> bytes:
        return read_bytes(self.paths[index])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


def _several(value: object, where: str) -> list[str]:
    """The labels of a picture, from what a row has for them."""
    if value is None or isinstance(value, str):
        return [each.strip() for each in (value or "").split(_SEPARATOR) if each.strip()]
    if isinstance(value, list) and all(isinstance(each, str | int) for each in value):
        return [str(each) for each in value]
    raise DataError(f"{where} has {value!r} for its labels; expected a list of class names, or {_SEPARATOR!r} between.")


def read_classes(root: Path) -> list[str]:
    """The class names in ``root/classes.txt``, one a line; empty if there is no such file.

    Raises:
        DataError: If it is not UTF-8 or cannot be read.
    """
    path = root / "classes.txt"
    try:
        return path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {reason(error)}.") from error


def subfolders(root: Path) -> list[Path]:
    """The folders in ``root``, by name; hidden ones are left out."""
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _rows(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is not an object")
            return rows
        return list(csv.DictReader(text.splitlines(), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True))
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{file} is not valid {file.suffix[1:].upper()}: {reason(error)}.") from error


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
