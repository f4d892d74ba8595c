"""Writing a data set as tar shards, which are quicker to copy and to read than many small files."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from zoo.atomic import write_atomically
from zoo.data.sources import ImageSource
from zoo.errors import DataError

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def pack_pictures(
    source: ImageSource,
    out: Path,
    split: str,
    *,
    per_shard: int = 1000,
    on_shard: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """Write ``<split>-00000.tar``, ... and ``classes.txt`` into the folder ``out``; an interrupted call goes on.

    The pictures are copied byte for byte, in the source's order; what is no picture is left out.

    Args:
        source: The pictures; the same on every call.
        out: :func:`zoo.data.sources.open_source` reads it.
        split: Name of the split.
        per_shard: Pictures in a shard.
        on_shard: Called with the number of pictures done after each shard.

    Returns:
        What was left out of the shards that this call wrote: where it is, and why.

    Raises:
        DataError: If a file cannot be written, or the folder holds shards of other classes.
    """
    skipped: dict[str, str] = {}
    names = "".join(f"{name}\n" for name in source.classes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        classes = out / "classes.txt"
        if classes.is_file() and classes.read_text(encoding="utf-8") != names:
            raise DataError(f"{out} holds shards of other classes; choose another folder.")
        with write_atomically(classes) as file:
            file.write(names.encode())
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


def _members(source: ImageSource, indices: range, skipped: dict[str, str]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for index in indices:
        where = source.describe(index)
        try:
            data = source.encoded(index)
            suffix = _SUFFIXES[Image.open(io.BytesIO(data)).format or ""]
        except (DataError, UnidentifiedImageError, KeyError):
            skipped[where] = f"{where} is not a picture that can be packed."
            continue
        label = source.labels[index]
        if source.multi_label:
            about = "json", json.dumps({"labels": np.flatnonzero(label).tolist()}).encode()
        else:
            about = "cls", str(int(label)).encode()
        for kind, content in ((suffix, data), about):
            member = tarfile.TarInfo(f"{index:09d}.{kind}")
            member.size = len(content)
            yield member, content
