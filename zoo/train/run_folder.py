"""A run folder: all there is to evaluate, resume or use a training run. Nothing is looked up elsewhere.

config.json          the model's config, preprocessing and class names
recipe.toml          the resolved recipe
environment.json     versions, device, threads
manifest.json        hashes of recipe, data and code
model.safetensors    the weights to use
checkpoint.safetensors   everything that resuming needs
metrics.csv          a row an epoch
curves.png           the same as a picture
report.html          curves, mistakes or samples of text, cost
result.json          the final figures
tensorboard/         events for TensorBoard
sample.png           a held-out picture to try `zoo predict` on
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zoo.atomic import write_atomically
from zoo.config import ModelConfig
from zoo.errors import TrainingError, WeightsError
from zoo.preprocessing import Preprocessing
from zoo.registry import config_from_dict


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    def foreign(self) -> list[str]:
        """What is in the folder that no run has put there before its recipe; hidden files do not count."""
        ours = {self.config.name, self.environment.name, self.manifest.name, self.sample.name}
        entries = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(entry.name for entry in entries if entry.name not in ours and not entry.name.startswith("."))

    def sweep(self) -> None:
        """Remove the half-written files that a killed run has left."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def sample(self) -> Path:
        return self.path / "sample.png"


@dataclass(frozen=True)
class ModelRecord:
    """What config.json holds: enough to build a model and to feed it."""

    name: str  # the variant, with its tag if the run started from one
    config: ModelConfig
    preprocessing: Preprocessing | None  # of pictures
    labels: tuple[str, ...]
    tokenizer: str = ""  # of text: what zoo.data.tokens.load_tokenizer takes
    multi_label: bool = False  # whether a picture may have several labels: each logit is a question of its own

    def write(self, folder: RunFolder) -> None:
        """Write ``config.json`` atomically."""
        values = {
            "name": self.name,
            "config": json.loads(self.config.to_json()),
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing is not None else None,
            "labels": self.labels,
            "tokenizer": self.tokenizer,
            "multi_label": self.multi_label,
        }
        write_json(folder.config, values)

    @classmethod
    def read(cls, folder: RunFolder) -> "ModelRecord":
        """Read ``config.json``.

        Raises:
            WeightsError: If the folder has none, or it is not one of zoo's.
        """
        values = read_json(folder.config)
        try:
            return cls(
                name=values["name"],
                config=config_from_dict(values["config"]),
                preprocessing=Preprocessing.from_dict(values["preprocessing"]) if values["preprocessing"] else None,
                labels=tuple(values["labels"]),
                tokenizer=values["tokenizer"],
                multi_label=values["multi_label"],
            )
        except (KeyError, TypeError) as error:
            raise WeightsError(f"{folder.config} is not a run folder's config: {error} is missing or wrong.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        WeightsError: If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path.parent} is not a run folder: it has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"Cannot read {path}: {error}.") from error


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; errors as for :func:`write_file`."""
    with write_file(path) as file:
        file.write(text.encode())


@contextmanager
def write_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes ``path`` when the block ends without an error.

    Raises:
        TrainingError: If it cannot be written; what was there before is kept.
    """
    try:
        with write_atomically(path) as file:
            yield file
    except OSError as error:
        raise TrainingError(
            f"Cannot write {path}: {error.strerror or error}. What was there before is kept."
        ) from error


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the whole table atomically; floats with every digit, so that equal runs give equal files."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
