"""Pictures in tar shards, in WebDataset's layout.

A sample's files stand next to each other and share a name up to the first dot: ``0001.jpg``, ``0001.cls``. Opening a
shard reads its headers once; after that any picture is one read at a known offset. So shards are shuffled, resumed and
shared out among processes as every other source is, not as streams.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.data.sources.base import IMAGE_SUFFIXES, ImageSource, label_sets_and_classes, labels_and_classes
from zoo.data.sources.files import read_classes
from zoo.errors import DataError, reason


class ShardSource(ImageSource):
    """Tar shards whose samples are a picture and a label.

    The label is a ``.cls`` file (an index or a class name) or ``label`` in a ``.json`` file, which may have a list of
    ``labels`` instead; ``classes.txt`` beside the shards, a name a line, names the indices.

    Raises:
        DataError: If a shard is damaged or cut short, or a sample lacks its picture or label.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._open: dict[int, int] = {}  # shard -> file descriptor
        places: list[tuple[int, int, int]] = []  # shard, offset, size
        self.keys: list[str] = []
        labels: list[str | list[str]] = []
        for shard, file in enumerate(self.files):
            for key, members in _samples(file).items():
                picture = next((each for suffix, each in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
                if picture is None:
                    raise DataError(f"{file}: sample {key!r} has no picture, only {', '.join(members)}.")
                places.append((shard, *picture))
                labels.append(self._label(shard, key, members))
                self.keys.append(key)
        self._places = np.asarray(places, dtype=np.int64).reshape(-1, 3)
        where = str(files[0].parent if len(files) > 1 else files[0])
        classes = read_classes(self.files[0].parent)
        several = [label for label in labels if isinstance(label, list)]
        if several and len(several) < len(labels):
            raise DataError(
                f"{where}: {len(several)} of {len(labels)} samples have several labels; expected all or none."
            )
        if several:
            self.labels, self.classes = label_sets_and_classes(several, classes, where)
        else:
            self.labels, self.classes = labels_and_classes(labels, classes, where)  # type: ignore[arg-type]

    def _label(self, shard: int, key: str, members: dict[str, tuple[int, int]]) -> str | list[str]:
        try:
            if "cls" in members:
                return self._read(shard, *members["cls"]).decode().strip()
            values = json.loads(self._read(shard, *members["json"]))
            return list(map(str, values["labels"])) if "labels" in values else str(values["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.files[shard]}: sample {key!r} has no label; expected a .cls file.") from error

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._open:
            self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
        # A read at an offset moves no file position, which forked workers would share.
        return os.pread(self._open[shard], size, offset)

    def encoded(self, index: int) -> bytes:
        shard, offset, size = map(int, self._places[index])
        try:
            return self._read(shard, offset, size)
        except OSError as error:
            raise DataError(f"Cannot read {self.describe(index)}: {error.strerror}.") from error

    def describe(self, index: int) -> str:
        return f"{self.files[int(self._places[index, 0])]}, sample {self.keys[index]}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def _samples(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample key -> file suffix -> (offset, size)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not stem:  # a hidden file
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[suffix.lower()] = member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"Cannot read {file} as a tar shard: {reason(error)}.") from error
    return samples
