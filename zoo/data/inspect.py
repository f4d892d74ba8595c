"""Looking at a data set before training on it: counts, sizes, balance, damage, and a sheet of pictures."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from zoo.atomic import write_atomically
from zoo.data.image import decode_image
from zoo.data.sources import ImageSource, class_counts, members_of
from zoo.errors import DataError

_SIDE, _COLUMNS, _ROWS = 112, 10, 8  # of the contact sheet: pixels of a picture, and how many


@dataclass
class Inspection:
    """What was found.

    Attributes:
        samples: How many there are.
        per_class: Pictures of each class, by name.
        formats: Pictures of each format and mode, such as ``"JPEG RGB"``.
        widths, heights: Smallest, median and largest, in pixels.
        total_bytes: Of the encoded pictures.
        corrupt: What cannot be read: where it is, and why.
        duplicates: Pictures that are byte for byte another one.
    """

    samples: int
    per_class: dict[str, int]
    formats: dict[str, int] = field(default_factory=dict)
    widths: tuple[int, int, int] = (0, 0, 0)
    heights: tuple[int, int, int] = (0, 0, 0)
    total_bytes: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def imbalance(self) -> float:
        """The largest class over the smallest."""
        counts = self.per_class.values()
        return max(counts) / max(min(counts), 1)


def inspect_pictures(source: ImageSource, *, on_picture: Callable[[], Any] | None = None) -> Inspection:
    """Read and decode every picture.

    Args:
        source: The pictures.
        on_picture: Called after each.
    """
    counts = class_counts(source.labels, len(source.classes))
    found = Inspection(len(source), dict(zip(source.classes, counts.tolist(), strict=True)))
    formats: Counter[str] = Counter()
    sizes, seen = [], set()
    for index in range(len(source)):
        try:
            data = source.encoded(index)
            found.total_bytes += len(data)
            image = decode_image(data, source.describe(index))
            sizes.append(image.size)
            header = Image.open(io.BytesIO(data))
            formats[f"{header.format} {header.mode}"] += 1
            digest = hashlib.sha256(data).digest()
            found.duplicates += digest in seen
            seen.add(digest)
        except DataError as error:
            found.corrupt[source.describe(index)] = str(error)
        if on_picture is not None:
            on_picture()
    found.formats = dict(formats.most_common())
    if sizes:
        found.widths, found.heights = (
            (int(min(side)), int(np.median(side)), int(max(side))) for side in zip(*sizes, strict=True)
        )
    return found


def contact_sheet(source: ImageSource, path: Path, *, seed: int = 0) -> None:
    """Write a sheet of pictures, a few of as many classes as fit, as a PNG.

    Raises:
        DataError: If the file cannot be written.
    """
    generator = np.random.default_rng(seed)
    rows = min(len(source.classes), _ROWS)
    shown = sorted(generator.permutation(len(source.classes))[:rows])
    sheet = Image.new("RGB", (_SIDE * _COLUMNS, (_SIDE + 14) * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(shown):
        top = row * (_SIDE + 14)
        draw.text((2, top + 1), source.classes[label], fill="black")
        members = generator.permutation(members_of(source.labels, label))[:_COLUMNS]
        for column, index in enumerate(members):
            try:
                image = decode_image(source.encoded(int(index)), source.describe(int(index)))
            except DataError:
                continue  # counted elsewhere
            image.thumbnail((_SIDE, _SIDE))
            sheet.paste(image, (column * _SIDE, top + 14))
    try:
        with write_atomically(path) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error
