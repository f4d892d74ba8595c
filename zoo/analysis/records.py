"""Speed passports on disk: JSON lines, one record a line. Those measured here are in zoo's part of the cache.

Records that zoo ships, or that others hand over, are read the same way; ``machine`` and ``measured_by`` say whose they
are, and nothing takes them for this machine's.
"""

import csv
import io
import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from zoo.analysis.benchmark import Passport
from zoo.atomic import write_atomically
from zoo.config import type_hints
from zoo.errors import DataError, nearest
from zoo.pretrained.files import cache_folder
from zoo.resources import folder

# What tells two figures apart; of two that agree in all of it, the later one counts.
_KEY = (
    *("model", "config", "batch", "input", "device", "backend", "precision", "memory_format"),
    *("threads", "clock", "machine", "measured_by"),
)


def local_records() -> Path:
    """The file in which ``zoo bench`` keeps what it measures."""
    return cache_folder("speed") / "records.jsonl"


def shipped_records() -> list[Path]:
    """The files of records that come with zoo."""
    return sorted((folder("weights") / "results").glob("speed*.jsonl"))


def read_records(path: str | Path) -> list[Passport]:
    """The records of a file.

    Raises:
        DataError: If it cannot be read, or a line is no record; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as records: {error}.") from error
    return [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, place: str) -> Passport:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is no record: invalid JSON.") from error
    if not isinstance(values, dict):
        raise DataError(f"{place} is no record: expected a JSON object, got {type(values).__name__}.")
    specs = {spec.name: spec for spec in fields(Passport)}
    for name in values:
        if name not in specs:
            raise DataError(f"{place}: unknown field {name!r}.{nearest(name, specs)}")
    hints = type_hints(Passport)
    for name, value in values.items():
        kinds = typing.get_args(hints[name]) if type(None) in typing.get_args(hints[name]) else (hints[name],)
        if not _fits(value, kinds):
            raise DataError(f"{place}: {name} is {value!r}, which is not of the right type.")
    for name, spec in specs.items():
        if name not in values and spec.default is MISSING:
            raise DataError(f"{place}: the field {name!r} is missing.")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    record = Passport(**given)
    if record.latency_ms <= 0 or record.batch < 1:
        raise DataError(f"{place}: latency_ms is {record.latency_ms} and batch {record.batch}; expected more than 0.")
    return record


def _fits(value: Any, kinds: Sequence[Any]) -> bool:
    for kind in kinds:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if typing.get_origin(kind) is tuple:
            if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
                return True
        elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return True
    return False


def save_records(records: Iterable[Passport], path: str | Path) -> None:
    """Add records to a file, in place of earlier ones of the same figure. A kill leaves the old file or the new one."""
    path = Path(path)
    known = read_records(path) if path.is_file() else []
    merged = {key(record): record for record in [*known, *records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        for record in merged.values():
            file.write(json.dumps(asdict(record)).encode() + b"\n")


def key(record: Passport) -> tuple[Any, ...]:
    """What tells the record's figure from others."""
    return tuple(getattr(record, name) for name in _KEY)


def as_csv(records: Iterable[Passport]) -> str:
    """The records as a table, a column for each field; lists with spaces between their numbers."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [spec.name for spec in fields(Passport)], lineterminator="\n")
    writer.writeheader()
    for record in records:
        values = asdict(record).items()
        writer.writerow({name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in values})
    return text.getvalue()
