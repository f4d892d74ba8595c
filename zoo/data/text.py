"""Where text comes from: plain files, JSONL, parquet, Hub data sets, and the embedded tiny Shakespeare."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoo.data.sources import EMBEDDED
from zoo.data.sources.opening import files_of_split, is_hub_name, parquet_files
from zoo.data.sources.tables import load_hub, read_parquet
from zoo.errors import DataError, nearest, reason

_SUFFIXES = ("txt", "jsonl", "parquet")


def tiny_shakespeare() -> str:
    """Karpathy's tiny Shakespeare: 1,115,394 characters of plays, public domain."""
    return gzip.decompress((EMBEDDED / "tinyshakespeare.txt.gz").read_bytes()).decode()


class Documents:
    """Texts in a fixed order, to be gone through as often as one likes.

    Attributes:
        name: For error messages.
    """

    def __init__(self, name: str, iterate: Callable[[], Iterator[str]]) -> None:
        self.name = name
        self._iterate = iterate

    def __iter__(self) -> Iterator[str]:
        return self._iterate()


def open_documents(
    name: str, *, split: str = "train", root: str = "", column: str = "text", streaming: bool = False
) -> Documents:
    """Open a text data set.

    Args:
        name: ``"tinyshakespeare"`` (embedded), a file or a folder of files for each split, or a Hub data set as
            ``"owner/name"``. A ``.txt`` file is one document; a line of ``.jsonl`` or a row of ``.parquet`` is one.
        split: ``"train"``, ...; in a folder, the files named ``train.*`` or ``train-*``.
        root: A local copy that stands for ``name``.
        column: Which field of a line or row holds the text.
        streaming: Read a Hub data set without downloading it first.

    Raises:
        DataError: If it cannot be found; while it is gone through, if it cannot be read.
    """
    place = Path(root or name).expanduser()
    if not root and name == "tinyshakespeare":
        _only_train(name, split)
        return Documents(name, lambda: iter([tiny_shakespeare()]))
    if place.is_file():
        _only_train(name, split)
        if place.suffix[1:] not in _SUFFIXES:
            raise DataError(f"{place} is a file; expected one that ends in .{', .'.join(_SUFFIXES)}.")
        return Documents(str(place), lambda: _read(place, column))
    if place.is_dir():
        files = next((found for suffix in ("txt", "jsonl") if (found := files_of_split(place, split, suffix))), None)
        files = files or parquet_files(place, split)
        if not files:
            raise DataError(f"{place} holds no text; expected files that end in .{', .'.join(_SUFFIXES)}.")
        return Documents(str(place), lambda: (text for file in files for text in _read(file, column)))
    if root:
        raise DataError(f"data.root is {root!r}, which is not there; expected a file or a folder.")
    if is_hub_name(name):
        data = load_hub(name, split, streaming=streaming)
        return Documents(f"{name}[{split}]", lambda: (_field(record, column, name) for record in data))
    raise DataError(
        f"Unknown text {name!r}.{nearest(name, ['tinyshakespeare'])} Expected 'tinyshakespeare', a file that ends in "
        f".{', .'.join(_SUFFIXES)}, a folder of such files or of tokens, or a Hub data set as owner/name."
    )


def _only_train(name: str, split: str) -> None:
    if split != "train":
        raise DataError(f"{name!r} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")


def _read(file: Path, column: str) -> Iterator[str]:
    if file.suffix == ".parquet":
        table = read_parquet(file)
        if column not in table.column_names:
            raise DataError(_no_column(str(file), column, table.column_names))
        texts = (text for chunk in table.column(column).chunks for text in chunk.to_pylist())
        for number, text in enumerate(texts, 1):
            yield _field({column: text}, column, f"{file}, row {number}")
        return
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(json.loads(line), column, f"{file}, line {number}")
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise error if isinstance(error, DataError) else DataError(f"{file} is damaged: {reason(error)}.") from error


def _field(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        raise DataError(_no_column(where, column, list(record) if isinstance(record, dict) else []))
    return record[column]


def _no_column(where: str, column: str, columns: list[str]) -> str:
    known = f"It has: {', '.join(columns)}." if columns else "Expected an object."
    return f"{where} has no text in {column!r}; set data.text_column. {known}"
