"""Files of weights on this machine: hashes, and zoo's own part of the cache. Imports no torch.

What comes from the Hub is in huggingface_hub's cache. Beside it, in ``$HF_HOME/zoo``, is what does not::

    downloads/<sha256>/<file>         fetched from a URL
    converted/<model.tag>.safetensors   converted from the authors' file
"""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_oid_of(path: str | Path) -> str:
    """The name that git, and so the Hub, gives a small file: the sha1 of its length and its content."""
    data = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def cache_folder(kind: str) -> Path:
    """``$HF_HOME/zoo/<kind>``; it may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "zoo" / kind
