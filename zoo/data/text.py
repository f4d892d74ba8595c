"""Embedded text."""

import gzip

from zoo.data.sources import EMBEDDED


def tiny_shakespeare() -> str:
    """Karpathy's tiny Shakespeare: 1,115,394 characters of plays, public domain."""
    return gzip.decompress((EMBEDDED / "tinyshakespeare.txt.gz").read_bytes()).decode()
