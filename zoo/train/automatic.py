"""A recipe for fine-tuning a model on somebody's pictures, of which nothing is known but where they are."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.data.sources import ImageSource, class_counts, open_source
from zoo.errors import DataError, RecipeError
from zoo.pretrained.manifest import get_weights
from zoo.registry import get_config
from zoo.train.recipe import Recipe, load_recipe, parse_overrides

_BASE = "finetune/layer_decay"
_STEPS = 3000  # optimiser steps that are enough for most; less data has fewer
_EPOCHS = (5, 30)
_BATCH = (8, 64)
_VAL = ("val", "validation", "valid")  # names of the split to look at while training


@dataclass(frozen=True)
class Choice:
    """A recipe, and a line for each thing that was decided by looking at the data."""

    recipe: Recipe
    notes: tuple[str, ...]


def finetune_recipe(model: str, data: str, overrides: Iterable[str] = ()) -> Choice:
    """The recipe ``finetune/layer_decay`` for this model and these pictures.

    The data's own splits are used; without one to look at, a part of the training pictures is held out. The batch is so
    small that an epoch has eight steps, and at most 64; there are at most 30 epochs and about 3,000 steps, and the
    training ends early when the averaged weights get no better.

    Args:
        model: A variant with weights, or variant.tag.
        data: What ``data.name`` takes: a folder, a file, or a data set of the Hub.
        overrides: ``"section.key=value"``, which have the last word.

    Raises:
        UnknownModelError, WeightsError: If there is no such model, or it has no weights.
        RecipeError: If the model reads text, or an override makes no sense.
        DataError: If the pictures cannot be read.
    """
    if not hasattr(get_config(model), "img_size"):
        raise RecipeError(f"{model} reads text; expected an image model, or a recipe (`zoo recipes list`).")
    get_weights(model)  # or the error that says where there are some
    overrides = list(overrides)
    wanted = dict(parse_overrides(overrides))
    values: dict[str, object] = {"model.name": model, "data.name": str(Path(data)) if Path(data).exists() else data}
    source = open_source(data)
    count, notes = len(source), [f"{len(source):,} pictures of {len(source.classes)} classes to train on"]
    val, val_source = next(((each, found) for each in _VAL if (found := _split(data, each, source))), ("", None))
    test_source = _split(data, "test", source)
    if test_source and val_source and _same(test_source, val_source):
        test_source = None  # a folder without one has given its other split
    if "data.val_split" in wanted:
        pass
    elif val_source:
        values["data.val_split"] = val
        notes.append(f"the data's own split {val!r} to look at while training: {len(val_source):,} pictures")
    else:
        values["data.holdout"] = wanted.get("data.holdout", 0.1 if count >= 1000 else 0.2)
        share = load_recipe(_BASE, _lines(values)).data.holdout  # or the error that says what is wrong with it
        held = round(share * count)
        count -= held
        notes.append(f"no split 'val': {share:.0%} of each class held out, about {held:,} pictures")
    if test_source:
        values["data.test_split"] = "test"
        notes.append(f"the data's own split 'test' for `zoo eval`: {len(test_source):,} pictures")
    batch = min(max(2 ** int(np.log2(max(count / 8, 1))), _BATCH[0]), _BATCH[1])
    epochs = min(max(round(_STEPS * batch / count), _EPOCHS[0]), _EPOCHS[1])
    values |= {"train.batch_size": batch, "schedule.epochs": epochs}
    batch, epochs = wanted.get("train.batch_size", batch), wanted.get("schedule.epochs", epochs)
    notes.append(f"batches of {batch}, at most {epochs} epochs, fewer when it gets no better")
    counts = class_counts(source.labels, len(source.classes))
    if source.multi_label:
        values |= {"loss.name": "bce", "augment.smoothing": 0.0}
        notes.append(
            f"{source.labels.sum(1).mean():.1f} labels a picture, classes of {counts.min():,} to {counts.max():,}: "
            "binary cross-entropy, rare labels weighed up"
        )
    elif counts.max() > 1.5 * max(counts.min(), 1):
        notes.append(f"classes of {counts.min():,} to {counts.max():,} pictures, weighed to count equally")
    else:
        values["loss.class_weights"] = False
    chosen = {key: value for key, value in values.items() if key not in wanted}
    return Choice(load_recipe(_BASE, [*_lines(chosen), *overrides]), tuple(notes))


def _split(data: str, split: str, train: ImageSource) -> ImageSource | None:
    try:
        found = open_source(data, split=split)
    except DataError:
        return None
    return None if _same(found, train) else found


def _same(left: ImageSource, right: ImageSource) -> bool:
    return len(left) == len(right) and left.describe(0) == right.describe(0)


def _lines(values: dict[str, object]) -> list[str]:
    return [f"{key}={_toml(value)}" for key, value in values.items()]


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
