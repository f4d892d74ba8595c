"""Evaluating a run folder, from what it holds alone."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from torch import nn

from zoo.data.loader import Samples, TextSamples, dead_workers_named
from zoo.data.sources import stratified_holdout
from zoo.data.tokens import Rows
from zoo.errors import RecipeError, TrainingError
from zoo.inference import Classifier, as_classifier, load_model
from zoo.train.device import is_out_of_memory, make_accelerator
from zoo.train.recipe import Recipe, load_recipe
from zoo.train.run_folder import RunFolder
from zoo.train.scoring import Scoring, TextScoring, evaluate, image_scoring
from zoo.train.tasks import eval_loader, eval_samples, open_split, open_tokens


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
        ``split``, ``samples`` (pictures, or rows of text) and ``loss`` (nats); ``top1`` and ``top5`` (percent) of
        pictures, ``map`` and ``f1`` (percent) of pictures with several labels, ``perplexity`` of text.

    Raises:
        WeightsError: If this is not a run folder.
        DataError: If the data cannot be read, or it has a class that the run has not.
        RecipeError: If there are more processes than samples.
        TrainingError: If memory runs out with one sample a pass, or, with several processes, at all.
    """
    model, record = load_model(path, weights=weights)
    recipe = load_recipe(RunFolder(Path(path)).recipe)
    split = split or recipe.data.test_split or "heldout"
    samples: Samples
    scoring: Scoring
    if recipe.task == "language-modelling":
        samples, scoring = _text(recipe, split, root), TextScoring()
    else:
        classifier = as_classifier(model, record, path)
        samples = _pictures(recipe, classifier, split, root)
        scoring = image_scoring(
            classifier.preprocessing,
            channels_last=recipe.train.channels_last,
            multi_label=classifier.multi_label,
        )
    try:
        accelerator = make_accelerator(recipe.train.precision)  # so that the figures are those seen in training
    except RecipeError:  # trained on another machine
        accelerator = make_accelerator("fp32")
    model = model.to(accelerator.device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    figures = _figures(model, samples, recipe, scoring, accelerator)
    return {"split": split, "samples": len(samples), **figures}


def _figures(
    model: nn.Module, samples: Samples, recipe: Recipe, scoring: Scoring, accelerator: Accelerator
) -> dict[str, float]:
    """In passes as in training, as far as memory has them."""
    limit, world = recipe.train.micro_batch, accelerator.num_processes
    size = max(recipe.train.batch_size // world, 1)
    if limit > 0:
        size = min(size, limit)
    while True:
        try:
            with dead_workers_named():
                return evaluate(model, eval_loader(samples, recipe, size, accelerator), scoring, accelerator)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if world > 1:  # the others wait for this one
                raise TrainingError(
                    f"Out of memory with passes of {size} samples; one process alone would try smaller ones."
                ) from error
            if size == 1:
                raise TrainingError("Out of memory with one sample a pass.") from error
        size //= 2
        release_memory()  # not in the handler, where the traceback still holds what was computed


def _pictures(recipe: Recipe, classifier: Classifier, split: str, root: str) -> Samples:
    data = recipe.data
    held_out = split == "heldout"
    name = (data.val_split or data.train_split) if held_out else split
    source = open_split(data, name, classifier.labels, multi_label=classifier.multi_label, root=root)
    indices = np.arange(len(source))
    if held_out and not data.val_split:
        indices = stratified_holdout(source.labels, data.holdout, recipe.seed)[1]
    return eval_samples(source, indices, classifier.preprocessing)


def _text(recipe: Recipe, split: str, root: str) -> Samples:
    data = recipe.data
    held_out = split == "heldout"
    tokens = open_tokens(data, (data.val_split or data.train_split) if held_out else split, root=root)
    if held_out and not data.val_split:
        tokens = tokens.split(data.holdout)[1]
    return TextSamples(Rows(tokens, data.seq_len, keep_tail=True))
