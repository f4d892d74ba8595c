"""Files that are either whole or not there: written beside their place, flushed to disk, then renamed onto it.

A kill, a crash or a full disk at any moment leaves the previous file as it was.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: As the writing raised it, for example when the disk is full; a previous file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def save_safetensors(
    tensors: "Mapping[str, Tensor]", path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically as a safetensors file, with ``format: pt`` among its metadata as loaders expect.

    Args:
        tensors: By name; copied to the CPU and made contiguous where they are not. No two may share memory.
        path: The file to write; its folder exists.
        metadata: Strings to keep in the file's header.

    Raises:
        OSError: If the file cannot be written; a previous file is untouched.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # Serialised in memory: safetensors' own file writer hides the OSError and leaves a file that only its owner reads.
    data = save(contiguous, {"format": "pt", **(metadata or {})})
    with write_atomically(path) as file:
        file.write(data)


def load_safetensors(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of a file that zoo wrote, by name, read and not mapped.

    What is mapped changes with the file, and ends the process when somebody cuts the file short.
    """
    from safetensors.torch import load_file

    return load_file(path, backend="pread")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
