"""Files of weights on this machine: hashes, and zoo's own part of the cache. Imports no torch.

What comes from the Hub is in huggingface_hub's cache. Beside it, in ``$HF_HOME/zoo``, is what does not::

    downloads/<sha256>/<file>         fetched from a URL
    downloads/unchecked-<...>/<file>  the same without a known hash, to convert; named after the URL
    converted/<model.tag>.safetensors   converted from the authors' file
    verified/<sha256>                 which file was last found to have this hash
    verified/sound-<sha256 of path>   the same for one whose header describes it and whose values are numbers
    built/<sha256>                    machine code of an optimised model that was built here
    speed/                            this machine's speed records and calibrations
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from zoo.atomic import write_atomically
from zoo.errors import WeightsError, reason

_MAX_HEADER = 100 << 20  # bytes; safetensors' own limit


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensors by name, and strings by name under ``"__metadata__"``.

    Raises:
        WeightsError: If it is none, or names something twice.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its header is no table")
        return header
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; expected a safetensors file.") from error
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file, perhaps a download cut short ({reason(error)})."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)[:100]!r} is in it twice")
    return table


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether a file's content has this hash; not computed again while the file is as it was when it had.

    "As it was" is what the file system says: same place, size, and times of its last write and of its last change of
    any kind, which programs cannot set. ``zoo weights verify`` does not rely on it.
    """
    if is_remembered(sha256, path):
        return True
    if sha256_of(path) != sha256:
        return False
    remember(sha256, path)
    return True


def is_remembered(fact: str, path: Path) -> bool:
    """Whether a file is as it was when :func:`remember` was told this fact about it."""
    try:
        return (cache_folder("verified") / fact).read_text() == _state_of(path)
    except (OSError, ValueError):
        return False


def remember(fact: str, path: Path) -> None:
    """Remember a fact about a file for as long as it stays as it is."""
    mark = cache_folder("verified") / fact
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(mark) as file:
            file.write(_state_of(path).encode())
    except OSError:
        pass  # a cache that cannot be written only costs time


def forget_verified() -> None:
    """Have everything that :func:`remember` was told checked anew."""
    for mark in cache_folder("verified").glob("*"):
        mark.unlink(missing_ok=True)


def _state_of(path: Path) -> str:
    state = path.stat()
    return f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def git_oid_of(path: str | Path) -> str:
    """The name that git, and so the Hub, gives a small file: the sha1 of its length and its content."""
    data = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def cache_folder(kind: str) -> Path:
    """``$HF_HOME/zoo/<kind>``; it may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "zoo" / kind
