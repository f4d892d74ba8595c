"""What differs between trainings: the model, its data, its loss and its metrics. The loop is in :mod:`engine`."""

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from zoo.data.augment import Mixing, TrainTransform
from zoo.data.image import EvalTransform, Normalise
from zoo.data.loader import Batch, EpochSampler, ImageSamples, Loader
from zoo.data.sources import ImageSource, Relabelled, StreamSource, open_source, open_stream, stratified_holdout
from zoo.errors import DataError, RecipeError
from zoo.factory import create_model
from zoo.preprocessing import Preprocessing
from zoo.registry import get_config
from zoo.train.recipe import Data, Recipe

_logger = logging.getLogger(__name__)


class ImageClassification:
    """A picture in, a class out: cross-entropy, top-1 and top-5 accuracy.

    Attributes:
        model: On the CPU, in train mode; its classifier fits the data set.
        preprocessing: What the model's input goes through.
        classes: Class names in label order.
    """

    best_metric = "top1"  # higher is better

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        data = recipe.data
        overrides = dict(recipe.model.overrides)
        get_config(recipe.model.name).override(**overrides)  # a mistake shows before the data is read
        self._open_data(recipe)
        self.classes = self.source.classes
        num_classes = overrides.pop("num_classes", len(self.classes))
        if num_classes != len(self.classes):
            raise DataError(
                f"{data.name} has {len(self.classes)} classes, but model.overrides.num_classes is {num_classes}; "
                "leave it out to fit the classifier to the data."
            )
        torch.manual_seed(recipe.seed)  # for what is initialised afresh
        self.model = create_model(
            recipe.model.name,
            recipe.model.pretrained,
            checkpoint=recipe.model.checkpoint or None,
            num_classes=num_classes,
            **overrides,
        )
        self.preprocessing = preprocessing_of(self.model, data)
        self.prepare = Prepare(self.preprocessing, channels_last=recipe.train.channels_last)
        augment = recipe.augment
        self.mixing = Mixing(augment, num_classes) if augment.mixup or augment.cutmix else None
        self.smoothing = 0.0 if self.mixing else augment.smoothing  # mixing smooths the labels itself
        if self.mixing and recipe.train.batch_size % 2:
            raise RecipeError(f"train.batch_size is {recipe.train.batch_size}; mixup and cutmix need an even one.")

    def _open_data(self, recipe: Recipe) -> None:
        data = recipe.data
        self.source: ImageSource | StreamSource
        self.train_indices: np.ndarray | None = None  # all
        if data.streaming:
            self.source = open_stream(
                data.name, split=data.train_split, root=data.root, size=data.samples, seed=recipe.seed
            )
        else:
            self.source = open_source(data.name, split=data.train_split, root=data.root)
        if data.val_split:
            self.val_source = open_split(data, data.val_split, self.source.classes)
            self.val_indices = np.arange(len(self.val_source))
        else:
            assert isinstance(self.source, ImageSource)  # a stream has a val_split: the recipe was checked
            self.val_source = self.source
            self.train_indices, self.val_indices = stratified_holdout(self.source.labels, data.holdout, recipe.seed)

    def train_loader(self, accelerator: Accelerator) -> Loader:
        """Shuffled, augmented batches for this process."""
        recipe = self.recipe
        dataset = ImageSamples(
            self.source,
            self.train_indices,
            TrainTransform(recipe.augment, self.preprocessing),
            seed=recipe.seed,
            replace=True,
        )
        sampler = EpochSampler(
            len(dataset),
            recipe.train.batch_size,
            shuffle=not recipe.data.streaming,  # a stream shuffles itself
            drop_last=True,
            seed=recipe.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        return Loader(dataset, sampler, workers=recipe.data.workers, max_corrupt=recipe.data.max_corrupt)

    def val_loader(self, accelerator: Accelerator) -> Loader:
        """The validation split, or the held-out part of the training split; every sample once."""
        return eval_loader(self.val_source, self.val_indices, self.preprocessing, self.recipe, accelerator)

    def loss(self, model: nn.Module, batch: Batch, *seed: int) -> Tensor:
        """Mean loss of a training batch; ``seed`` decides how it is mixed."""
        if self.mixing is not None:
            batch = self.mixing(batch, *seed)
        return F.cross_entropy(model(batch.inputs).float(), batch.targets, label_smoothing=self.smoothing)


def preprocessing_of(model: Any, data: Data) -> Preprocessing:
    """The model's own preprocessing at its own size, with what the recipe's data section replaces."""
    cfg = model.pretrained_cfg
    own = Preprocessing(
        img_size=model.config.input_hw,
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
        interpolation=cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
    )
    changes: dict[str, Any] = {"crop_pct": data.crop_pct, "interpolation": data.interpolation}
    return dataclasses.replace(own, **{key: value for key, value in changes.items() if value})


def open_split(data: Data, split: str, classes: tuple[str, ...], *, root: str = "") -> ImageSource:
    """A split to evaluate on, with its labels in the order of ``classes``; warns of classes that it has no sample of.

    Raises:
        DataError: If it cannot be read, or has a class that is not among them.
    """
    source = Relabelled(open_source(data.name, split=split, root=root or data.root), classes, f"Split {split!r}")
    if source.missing:
        shown = ", ".join(source.missing[:5]) + (", ..." if len(source.missing) > 5 else "")
        _logger.warning("Split %r has no sample of %d classes: %s", split, len(source.missing), shown)
    return source


class Prepare:
    """Takes a batch of pictures to the device and normalises it there."""

    def __init__(self, preprocessing: Preprocessing, *, channels_last: bool) -> None:
        self.normalise = Normalise(preprocessing, reuse=True)  # a batch is done with when the next one comes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        batch = batch.to(device)
        inputs = self.normalise(batch.inputs, batch.patches).contiguous(memory_format=self.layout)
        return dataclasses.replace(batch, inputs=inputs, patches=())


def eval_loader(
    source: ImageSource,
    indices: np.ndarray,
    preprocessing: Preprocessing,
    recipe: Recipe,
    accelerator: Accelerator,
) -> Loader:
    """Batches for evaluation: in order, every sample exactly once over all processes."""
    dataset = ImageSamples(source, indices, EvalTransform(preprocessing), seed=0)
    sampler = EpochSampler(
        len(dataset),
        recipe.train.batch_size,
        shuffle=False,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return Loader(dataset, sampler, workers=recipe.data.workers, max_corrupt=recipe.data.max_corrupt)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, prepare: Prepare, accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over all processes' batches."""
    was_training = model.training
    model.eval()
    double = torch.float32 if accelerator.device.type == "mps" else torch.float64  # which MPS has not
    totals = torch.zeros(4, dtype=double, device=accelerator.device)  # loss, top-1, top-5, samples
    for batch in loader:
        batch = prepare(batch, accelerator.device)
        with accelerator.autocast():
            logits = model(batch.inputs)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]
        totals[0] += F.cross_entropy(logits, batch.targets, reduction="sum")
        totals[1] += ranked[:, 0].sum()
        totals[2] += ranked.any(1).sum()
        totals[3] += len(batch.targets)
    model.train(was_training)
    loss, top1, top5, count = accelerator.reduce(totals).tolist()  # type: ignore[union-attr]
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


TASKS = {"image-classification": ImageClassification}
