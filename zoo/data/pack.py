"""Writing a data set as tar shards, which are quicker to copy and to read than many small files."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.atomic import write_atomically
from zoo.data.image import decode_image, image_format
from zoo.data.sources import ImageSource
from zoo.data.sources.files import read_classes
from zoo.errors import DataError

_SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a whole file has in its last bytes
_TAIL = 64  # bytes


def pack_pictures(
    source: ImageSource,
    out: Path,
    split: str,
    *,
    per_shard: int = 1000,
    on_shard: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """Write ``<split>-00000.tar``, ... and ``classes.txt`` into the folder ``out``; an interrupted call goes on.

    ``<split>.json`` says how the pictures are shared out among the shards. They are copied byte for byte, in the
    source's order; what is no picture, or one that is cut short, is left out.

    Args:
        source: The pictures; the same on every call.
        out: :func:`zoo.data.sources.open_source` reads it.
        split: Name of the split.
        per_shard: Pictures in a shard.
        on_shard: Called with the number of pictures done after each shard.

    Returns:
        What was left out of the shards that this call wrote: where it is, and why.

    Raises:
        DataError: If a file cannot be written, or the folder holds shards of other classes, of as many pictures as
            another ``per_shard`` says, or of another number of pictures.
    """
    skipped: dict[str, str] = {}
    names = "".join(f"{name}\n" for name in source.classes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        classes = out / "classes.txt"
        if classes.is_file() and read_classes(out) != names.splitlines():
            raise DataError(f"{out} holds shards of other classes; choose another folder.")
        with write_atomically(classes) as file:
            file.write(names.encode())
        _record(out, split, per_shard, len(source))
        for number, first in enumerate(range(0, len(source), per_shard)):
            last = min(first + per_shard, len(source))
            shard = out / f"{split}-{number:05d}.tar"
            if not shard.is_file():  # each is written whole or not at all
                with write_atomically(shard) as file, tarfile.open(fileobj=file, mode="w", bufsize=1 << 20) as tar:
                    for member, data in _members(source, range(first, last), skipped):
                        tar.addfile(member, io.BytesIO(data))
            if on_shard is not None:
                on_shard(last)
    except OSError as error:
        raise DataError(f"Cannot write {out}: {error.strerror or error}. What is there stays valid.") from error
    return skipped


def _record(out: Path, split: str, per_shard: int, count: int) -> None:
    """Write how the pictures are shared out, or refuse to go on with shards that do it otherwise."""
    path = out / f"{split}.json"
    values = {"per_shard": per_shard, "pictures": count}
    if any(out.glob(f"{split}-*.tar")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found == values:
                return
            about = f"of {found['pictures']} pictures, {found['per_shard']} in each"
        except (OSError, ValueError, KeyError, TypeError):
            about = f"and no {path.name} that says of what"
        raise DataError(
            f"{out} holds shards of {split!r} {about}; expected {count}, {per_shard} in each, or another folder."
        )
    with write_atomically(path) as file:
        file.write(json.dumps(values).encode() + b"\n")


def _members(source: ImageSource, indices: range, skipped: dict[str, str]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for index in indices:
        where = source.describe(index)
        try:
            data = source.encoded(index)
            kind = image_format(data, where)
            if kind not in _ENDS or _ENDS[kind] not in data[-_TAIL:]:
                decode_image(data, where)  # which takes long, and shows whether it is whole
        except DataError as error:
            skipped[where] = str(error)
            continue
        if kind not in _SUFFIXES:
            skipped[where] = f"{where} is {kind}; expected one of {', '.join(_SUFFIXES)}."
            continue
        label = source.labels[index]
        if source.multi_label:
            about = "json", json.dumps({"labels": np.flatnonzero(label).tolist()}).encode()
        else:
            about = "cls", str(int(label)).encode()
        for ending, content in ((_SUFFIXES[kind], data), about):
            member = tarfile.TarInfo(f"{index:09d}.{ending}")
            member.size = len(content)
            yield member, content
