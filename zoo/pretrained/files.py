"""Hashing files, and remembering which were found to be what they should be. Imports no torch."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
