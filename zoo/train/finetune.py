"""Fine-tuning, beside the same training from scratch when the recipe asks for it."""

import csv
from dataclasses import dataclass
from pathlib import Path

from zoo.train import report
from zoo.train.engine import Result, train
from zoo.train.recipe import Recipe
from zoo.train.run_folder import RunFolder


@dataclass(frozen=True)
class Comparison:
    """A run and, if there was one, the same run from random weights."""

    result: Result
    from_scratch: Result | None


def finetune(recipe: Recipe, out: str | Path, *, resume: bool = False, quiet: bool = False) -> Comparison:
    """Train as the recipe says; with ``train.from_scratch``, once more from random weights in ``out/from_scratch``.

    Both runs have the same data, schedule, budget and seed. The arguments and errors are those of
    :func:`zoo.train.engine.train`.
    """
    result = train(recipe, out, resume=resume, quiet=quiet)
    if not recipe.train.from_scratch:
        return Comparison(result, None)
    scratch = recipe.replace(
        **{"model.pretrained": False, "model.checkpoint": "", "train.from_scratch": False, "train.tune": "all"}
    )
    baseline = train(scratch, Path(out) / "from_scratch", resume=resume, quiet=quiet)
    folder = RunFolder(Path(out))
    histories = [read_metrics(RunFolder(run.folder)) for run in (result, baseline)]
    report.plot_curves(histories[0], folder.curves, other={"from scratch": histories[1]})
    return Comparison(result, baseline)


def read_metrics(folder: RunFolder) -> list[dict[str, float]]:
    with folder.metrics.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
