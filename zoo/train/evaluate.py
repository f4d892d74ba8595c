"""Evaluating a run folder, from what it holds alone."""

from pathlib import Path

import numpy as np
import torch

from zoo.data.sources import stratified_holdout
from zoo.errors import RecipeError
from zoo.inference import load_run
from zoo.train.device import make_accelerator
from zoo.train.recipe import load_recipe
from zoo.train.run_folder import RunFolder
from zoo.train.tasks import Prepare, eval_loader, evaluate, open_split


def evaluate_run(
    path: str | Path, *, split: str = "", root: str = "", weights: str | Path | None = None
) -> dict[str, float | str]:
    """Loss and accuracy of a run's weights.

    Args:
        path: The run folder.
        split: ``"heldout"`` for what was looked at while training, or a split of the data set; empty: the recipe's test
            split, or else ``"heldout"``.
        root: A local copy of the data set, if it has moved.
        weights: A safetensors file to evaluate instead of the run's own.

    Returns:
        ``split``, ``samples``, ``loss`` (nats), ``top1`` and ``top5`` (percent).

    Raises:
        WeightsError: If this is not a run folder.
        DataError: If the data cannot be read, or it has a class that the run has not.
    """
    classifier = load_run(path, weights=weights)
    folder = RunFolder(Path(path))
    recipe = load_recipe(folder.recipe)
    data = recipe.data
    split = split or data.test_split or "heldout"
    held_out = split == "heldout"
    name = (data.val_split or data.train_split) if held_out else split
    source = open_split(data, name, classifier.labels, root=root)
    indices = np.arange(len(source))
    if held_out and not data.val_split:
        indices = stratified_holdout(source.labels, data.holdout, recipe.seed)[1]
    try:
        accelerator = make_accelerator(recipe.train.precision)  # so that the figures are those seen in training
    except RecipeError:  # trained on another machine
        accelerator = make_accelerator("fp32")
    model = classifier.model.to(accelerator.device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = eval_loader(source, indices, classifier.preprocessing, recipe, accelerator)
    prepare = Prepare(classifier.preprocessing, channels_last=recipe.train.channels_last)
    figures = evaluate(model, loader, prepare, accelerator)
    return {"split": split, "samples": len(indices), **figures}
