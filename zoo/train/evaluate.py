"""Evaluating a run folder, from what it holds alone."""

from pathlib import Path

import numpy as np
import torch

from zoo.data.loader import Samples, TextSamples, dead_workers_named
from zoo.data.sources import stratified_holdout
from zoo.data.tokens import Rows
from zoo.errors import RecipeError
from zoo.inference import Classifier, as_classifier, load_model
from zoo.train.device import make_accelerator
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
    train = recipe.train
    batch_size = min(train.micro_batch, train.batch_size) if train.micro_batch > 0 else train.batch_size
    with dead_workers_named():
        figures = evaluate(model, eval_loader(samples, recipe, batch_size, accelerator), scoring, accelerator)
    return {"split": split, "samples": len(samples), **figures}


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
