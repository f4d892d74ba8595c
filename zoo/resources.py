"""Where the data folders are: ``recipes/`` and ``weights/`` of a checkout, or their copies in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The ``recipes`` or ``weights`` folder."""
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
