"""The folder that an export or an optimised model is: written as a whole, and over nothing but one of its kind."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import ExportError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what it is called, and entries that its manifest has and no other's."""

    words: str
    entries: frozenset[str]

    def check_place(self, path: Path) -> None:
        """Raise unless a folder of this kind may take this place.

        That a folder has a manifest says little: training runs have one too.

        Raises:
            ExportError: If something is there that is neither of this kind nor an empty folder.
        """
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = None
        if not isinstance(manifest, dict) or not self.entries <= manifest.keys():
            raise ExportError(f"{path} exists and is not {self.words}; expected a new folder.")

    @contextmanager
    def written(self, path: Path) -> Iterator[Path]:
        """A new folder to write in, which becomes ``path`` when the block ends without an error.

        Raises:
            ExportError: As :meth:`check_place`.
        """
        self.check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            if path.exists():
                path.rename(Path(temporary) / "old")
            new.rename(path)


EXPORTED = Kind("an exported model", frozenset({"format", "file", "checks", "exported_at"}))
OPTIMISED = Kind("an optimised model", frozenset({"format", "job", "files", "report"}))
