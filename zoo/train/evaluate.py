"""Evaluating a run folder, from what it holds alone."""

from pathlib import Path

import numpy as np
import torch

from zoo.data.sources import open_source, stratified_holdout
from zoo.errors import DataError, RecipeError
from zoo.inference import load_run
from zoo.train.device import make_accelerator
from zoo.train.recipe import load_recipe
from zoo.train.run_folder import RunFolder
from zoo.train.tasks import eval_loader, evaluate


def evaluate_run(
    path: str | Path, *, split: str = "", root: str = "", weights: str | Path | None = None
) -> dict[str, float | str]:
    """Loss and accuracy of a run's weights.

    Args:
        path: The run folder.
        split: ``"heldout"`` for the part of the training split that was held out, or a split of the data set; empty:
            the recipe's test split, or the held-out part if it names none.
        root: A local copy of the data set, if it has moved.
        weights: A safetensors file to evaluate instead of the run's own.

    Returns:
        ``split``, ``samples``, ``loss`` (nats), ``top1`` and ``top5`` (percent).

    Raises:
        WeightsError: If this is not a run folder.
        DataError: If the data cannot be read, or its classes are not the run's.
    """
    classifier = load_run(path, weights=weights)
    folder = RunFolder(Path(path))
    recipe = load_recipe(folder.recipe)
    data = recipe.data
    split = split or data.test_split or "heldout"
    name = data.train_split if split == "heldout" else split
    source = open_source(data.name, split=name, root=root or data.root)
    if source.classes != classifier.labels:
        difference = _differences(source.classes, classifier.labels)
        raise DataError(f"{data.name}, split {name!r}, has other classes than the run: {difference}.")
    indices = np.arange(len(source))
    if split == "heldout":
        indices = stratified_holdout(source.labels, data.holdout, recipe.seed)[1]
    try:
        accelerator = make_accelerator(recipe.train.precision)  # so that the figures are those seen in training
    except RecipeError:  # trained on another machine
        accelerator = make_accelerator("fp32")
    model = classifier.model.to(accelerator.device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = eval_loader(source, indices, classifier.preprocessing, recipe, accelerator)
    figures = evaluate(model, loader, accelerator, channels_last=recipe.train.channels_last)
    return {"split": split, "samples": len(indices), **figures}


def _differences(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    if len(found) != len(expected):
        return f"{len(found)}, not {len(expected)}"
    index = next(i for i in range(len(found)) if found[i] != expected[i])
    return f"class {index} is {found[index]!r}, not {expected[index]!r}"
