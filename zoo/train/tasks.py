"""What differs between trainings: the model, its data and its loss. The loop is in :mod:`engine`."""

import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from zoo.config import ImageConfig
from zoo.data.augment import Mixing, TrainTransform
from zoo.data.image import EvalTransform, decode_image
from zoo.data.loader import Batch, EpochSampler, ImageSamples, Loader, Samples, TextSamples, derive_seed
from zoo.data.sources import (
    ImageSource,
    Relabelled,
    StreamSource,
    class_counts,
    missing_classes,
    open_source,
    open_stream,
    stratified_holdout,
)
from zoo.data.text import open_documents
from zoo.data.tokens import IGNORED, Rows, Tokens, is_token_folder, load_tokenizer, read_tokens, tokenize
from zoo.errors import DataError, RecipeError
from zoo.factory import create_model
from zoo.preprocessing import Preprocessing
from zoo.registry import get_config
from zoo.train.distill import Teacher, self_taught
from zoo.train.recipe import Data, Loss, Recipe
from zoo.train.report import Page, class_figures_picture, confusion_picture, mistakes_picture
from zoo.train.run_folder import ModelRecord, RunFolder, write_file
from zoo.train.schedule import img_size_at
from zoo.train.scoring import (
    Scoring,
    TextScoring,
    average_precision,
    f1_score,
    image_scoring,
    next_token_answer,
    next_token_logits,
)

_MISTAKES = 15  # pictures of a report
_POSITIVE_WEIGHT = 20.0  # most that a yes counts over a no, or the reverse, with several labels a picture
_TEXTS, _WRITTEN = 3, 200  # texts of a report, and the tokens that are written for each

_logger = logging.getLogger(__name__)


class Task(ABC):
    """A model with what it learns from and how.

    Attributes:
        model: On the CPU, in train mode.
        train_samples: What is learned from.
        val_samples: What is looked at while training; every one of them once.
        scoring: How the model is judged on them.
        shuffle: Whether the sampler is to permute the training samples.
        share: How much of the training is done, from 0 to 1; the loop sets it before every step.
        average: The averaged weights as a model, which the loop sets if there are any.
    """

    model: nn.Module
    train_samples: Samples
    val_samples: Samples
    scoring: Scoring
    shuffle = True
    share = 0.0
    average: nn.Module | None = None

    @abstractmethod
    def __init__(self, recipe: Recipe) -> None: ...

    def check_batch(self, size: int) -> None:  # noqa: B027 -- most tasks have nothing to check
        """Raise :class:`RecipeError` if passes of so many samples cannot be trained on."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, *seed: int) -> Tensor:
        """The loss of each sample of a prepared training batch, ``[B]``; ``seed`` decides what is random."""

    @abstractmethod
    def write_record(self, folder: RunFolder, config: Any) -> None:
        """Write what is needed to use the model."""

    @abstractmethod
    def illustrate(self, page: Page, model: nn.Module, accelerator: Accelerator, batch_size: int) -> None:
        """Add to a report what the finished model does on the validation samples, with at most ``batch_size`` a pass.

        Runs on the main process alone.
        """

    @abstractmethod
    def data_hash(self) -> str:
        """A fingerprint of the training data, SHA-256 in hexadecimal."""


class ImageClassification(Task):
    """A picture in, a class out: cross-entropy, top-1 and top-5 accuracy. Or several classes, where the data says so.

    Attributes:
        preprocessing: What the model's input goes through.
        classes: Class names in label order.
        multi_label: Whether a picture may have several labels: each class is then a question of its own.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        overrides = dict(recipe.model.overrides)
        get_config(recipe.model.name).override(**overrides)  # a mistake shows before the data is read
        self._open_data(recipe)
        if self.multi_label:
            _check_multi_label(recipe)
        num_classes = overrides.pop("num_classes", len(self.classes))
        if num_classes != len(self.classes):
            raise DataError(
                f"{recipe.data.name} has {len(self.classes)} classes, but model.overrides.num_classes is "
                f"{num_classes}; leave it out to fit the classifier to the data."
            )
        self.model = _make_model(recipe, num_classes=num_classes, **overrides)
        if not isinstance(self.model.config, ImageConfig):
            raise RecipeError(f"{recipe.model.name} is no image model; set task='language-modelling'.")
        self.preprocessing = preprocessing_of(self.model, recipe.data)
        self.scoring = image_scoring(
            self.preprocessing, channels_last=recipe.train.channels_last, multi_label=self.multi_label
        )
        self.shuffle = not recipe.data.streaming  # a stream shuffles itself
        augment = recipe.augment
        size = self.preprocessing.img_size
        transform = TrainTransform(augment, self.preprocessing, partial(img_size_at, recipe.schedule, size))
        self.train_samples = ImageSamples(self.source, self.train_indices, transform, seed=recipe.seed, replace=True)
        self.val_samples = eval_samples(self.val_source, self.val_indices, self.preprocessing)
        self.mixing = Mixing(augment, num_classes) if augment.mixup or augment.cutmix else None
        smoothing = 0.0 if self.mixing else augment.smoothing  # mixing smooths the labels itself
        weights = self._class_weights() if recipe.loss.class_weights else None
        self.labels_loss = LabelsLoss(recipe.loss, smoothing, weights)
        distill = recipe.distill
        self.teacher: Teacher | None = None
        if distill.teacher not in ("", "ema"):
            self.teacher = Teacher(distill, self.model, self.classes, self.preprocessing)
            student: Any = self.model
            if distill.kind != "feature" and hasattr(student, "set_distilled_training"):
                student.set_distilled_training()  # one of its heads for the labels, the other for the teacher

    def _class_weights(self) -> Tensor:
        """``[num_classes]``: the inverse of how often a class comes in the training data, 1 for the average sample.

        Where pictures have several labels: what a class's pictures weigh over those without it, so that both together
        weigh the same, up to a limit.
        """
        if isinstance(self.source, StreamSource):
            raise RecipeError("loss.class_weights counts the labels first; expected data.streaming=false.")
        labels = self.source.labels if self.train_indices is None else self.source.labels[self.train_indices]
        counts = np.maximum(class_counts(labels, len(self.classes)), 1)
        if self.multi_label:
            weights = np.clip((len(labels) - counts) / counts, 1 / _POSITIVE_WEIGHT, _POSITIVE_WEIGHT)
        else:
            weights = len(labels) / (len(np.unique(labels)) * counts)
        return torch.tensor(weights, dtype=torch.float32)

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
        self.classes = self.source.classes
        self.multi_label = isinstance(self.source, ImageSource) and self.source.multi_label
        if data.val_split:
            self.val_source = open_split(data, data.val_split, self.source.classes, multi_label=self.multi_label)
            self.val_indices = np.arange(len(self.val_source))
        else:
            assert isinstance(self.source, ImageSource)  # a stream has a val_split: the recipe was checked
            self.val_source = self.source
            self.train_indices, self.val_indices = stratified_holdout(self.source.labels, data.holdout, recipe.seed)
            _warn_of_missing(self.source.labels[self.val_indices], self.classes, "The part that is held out")
        if isinstance(self.source, ImageSource):
            _warn_of_missing(self.source.labels, self.classes, f"Split {data.train_split!r}")
        if len(self.classes) == 1 and not self.multi_label:
            raise DataError(f"{data.name} has one class, {self.classes[0]!r}; expected two or more to tell apart.")

    def check_batch(self, size: int) -> None:
        if self.mixing and size % 2:
            raise RecipeError(f"A forward pass has {size} samples; mixup and cutmix need an even number.")

    def losses(self, model: nn.Module, batch: Batch, *seed: int) -> Tensor:
        if self.recipe.augment.sizes:
            batch = _resized(batch, self.recipe.augment.sizes, *seed)
        if self.mixing is not None:
            batch = self.mixing(batch, *seed)
        distill = self.recipe.distill
        started = self.share >= distill.start
        if self.teacher is not None and started:
            return self.teacher.losses(model, batch, self.labels_loss)
        answer = model(batch.inputs)
        if isinstance(answer, tuple):  # two heads, whose average is the answer as long as there is no teacher for one
            answer = sum(answer) / len(answer)
        losses = self.labels_loss(answer, batch.targets)
        if distill.teacher == "ema" and started:
            assert self.average is not None  # the recipe was checked
            losses = losses + distill.alpha * self_taught(answer, self.average, batch.inputs, self.recipe)
        return losses

    def write_record(self, folder: RunFolder, config: Any) -> None:
        about = self.preprocessing, self.classes
        ModelRecord(self.recipe.model.name, config, *about, multi_label=self.multi_label).write(folder)
        sample = self._sample()
        with write_file(folder.sample) as file:
            sample.save(file, "PNG")

    def _sample(self) -> Image.Image:
        """The first held-out picture, or the next in the place of one that may be skipped."""
        *spare, last = self.val_indices[: self.recipe.data.max_corrupt + 1].tolist()
        for index in spare:
            with suppress(DataError):
                return self._decoded(index)
        return self._decoded(last)

    def _decoded(self, index: int) -> Image.Image:
        return decode_image(self.val_source.encoded(index), self.val_source.describe(index))

    @torch.no_grad()
    def illustrate(self, page: Page, model: nn.Module, accelerator: Accelerator, batch_size: int) -> None:
        """The confusion matrix, or every class's figures; the pictures of which the model is the surest and wrong."""
        num_classes = len(self.classes)
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        answers, truth = [], []  # of several labels
        wrong: list[tuple[float, int, int]] = []  # (probability, position, answer)
        sampler = EpochSampler(len(self.val_samples), batch_size, shuffle=False)
        allowed = len(self.val_samples)  # they were counted before
        for batch in Loader(self.val_samples, sampler, workers=self.recipe.data.workers, max_corrupt=allowed):
            batch = self.scoring.prepare(batch, accelerator.device)
            with accelerator.autocast():
                logits = model(batch.inputs).float().cpu()
            targets = batch.targets.cpu()
            if self.multi_label:
                answers.append(logits)
                truth.append(targets)
                sure = torch.where(targets, (-logits).sigmoid(), logits.sigmoid())
                sure = sure.where(sure > 0.5, 0)
            else:
                best = logits.argmax(1)
                np.add.at(counts, (targets.numpy(), best.numpy()), 1)
                missed = F.one_hot(best, num_classes) * (best != targets)[:, None]
                sure = logits.softmax(1) * missed
            values, places = sure.flatten().topk(min(_MISTAKES, sure.numel()))
            rows, columns = places // num_classes, places % num_classes
            found = values.tolist(), batch.indices.cpu()[rows].tolist(), columns.tolist()
            wrong += (each for each in zip(*found, strict=True) if each[0] > 0)
            wrong = sorted(wrong, reverse=True)[:_MISTAKES]
        if self.multi_label:
            logits, targets = torch.cat(answers), torch.cat(truth)
            precisions, f1 = average_precision(logits, targets), f1_score(logits >= 0, targets, 0)
            picture = class_figures_picture(precisions.numpy(), f1.numpy(), self.classes)
            page.pictures.append(("Each class of the held-out part", picture))
        else:
            page.pictures.append(("Confusion matrix of the held-out part", confusion_picture(counts, self.classes)))
        if wrong:
            page.pictures.append(("The surest mistakes", mistakes_picture([self._mistake(*each) for each in wrong])))

    def _mistake(self, probability: float, position: int, answer: int) -> tuple[Image.Image, str]:
        """A held-out picture, and what the model says of it that is wrong."""
        index, name = int(self.val_indices[position]), self.classes[answer]
        labels = self.val_source.class_names_of(index)
        denied = "not " if name in labels else ""
        return self._decoded(index), f"{denied}{name} ({probability:.0%}), is {', '.join(labels) or 'none'}"

    def data_hash(self) -> str:
        digest = hashlib.sha256("\n".join(self.classes).encode())
        if isinstance(self.source, ImageSource):
            digest.update(self.source.labels.tobytes())
            for i in range(len(self.source)):
                digest.update(Path(self.source.describe(i)).name.encode())
        else:
            digest.update(self.source.name.encode())
        return digest.hexdigest()


def _check_multi_label(recipe: Recipe) -> None:
    """Refuse what has no meaning where a picture may have several labels.

    Raises:
        RecipeError: Naming the first such setting.
    """
    augment, distill = recipe.augment, recipe.distill
    wrong = {
        "loss.name is 'ce'; expected 'bce'": recipe.loss.name != "bce",
        "augment.mixup and augment.cutmix mix single labels; expected 0": bool(augment.mixup or augment.cutmix),
        f"distill.kind is {distill.kind!r}; expected 'feature', or distill.teacher='ema'": distill.teacher
        not in ("", "ema")
        and distill.kind != "feature",
    }
    for message, holds in wrong.items():
        if holds:
            raise RecipeError(f"{recipe.data.name} has several labels a picture, but {message}.")


class LabelsLoss:
    """What logits ``[B, num_classes]`` cost beside labels ``[B]`` or shares of classes ``[B, num_classes]``: ``[B]``.

    Labels that are ``[B, num_classes]`` bool are several a sample: each class is a question of its own.

    Args:
        loss: Which.
        smoothing: Of labels, not of shares: towards all classes alike, or, of several labels, towards one half.
        weights: ``[num_classes]``, what a sample of each class counts; of several labels, what a yes counts over a no.
    """

    def __init__(self, loss: Loss, smoothing: float, weights: Tensor | None = None) -> None:
        self.loss, self.smoothing, self.weights = loss, smoothing, weights

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self.weights is not None:
            self.weights = self.weights.to(logits.device)
        if targets.dtype == torch.bool:
            dense = targets * (1 - self.smoothing) + self.smoothing / 2
            answers = F.binary_cross_entropy_with_logits(logits, dense, reduction="none", pos_weight=self.weights)
            return answers.mean(1)
        if self.loss.name == "ce":
            losses = F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")
        else:
            dense = targets
            if targets.ndim == 1:
                dense = F.one_hot(targets, logits.shape[1]).float()
                dense = dense * (1 - self.smoothing) + self.smoothing / logits.shape[1]
            losses = F.binary_cross_entropy_with_logits(logits, dense, reduction="none").mean(1)
        if self.weights is None:
            return losses
        return losses * (self.weights[targets] if targets.ndim == 1 else targets @ self.weights)


def _resized(batch: Batch, sizes: tuple[int, ...], *seed: int) -> Batch:
    """The batch with its pictures resized to one of the sides, drawn from the seed."""
    *step, _process = seed  # the same side for all processes, which wait for each other
    side = sizes[derive_seed(*step, 0x51DE) % len(sizes)]
    if batch.inputs.shape[-2:] == (side, side):
        return batch
    inputs = F.interpolate(batch.inputs, (side, side), mode="bicubic", antialias=True)
    return dataclasses.replace(batch, inputs=inputs)


class LanguageModelling(Task):
    """Text in, the next token out: cross-entropy of every token that has a successor in its document."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        get_config(recipe.model.name).override(**recipe.model.overrides)
        self.tokens, val_tokens = self._open_data(recipe.data)
        self.model = _make_model(recipe, **recipe.model.overrides)
        vocab_size = getattr(self.model.config, "vocab_size", None)
        if vocab_size is None:
            raise RecipeError(f"{recipe.model.name} is no language model; set task='image-classification'.")
        if self.tokens.vocab_size > vocab_size:
            raise RecipeError(
                f"Tokenizer {self.tokens.tokenizer!r} has {self.tokens.vocab_size} tokens, {recipe.model.name} knows "
                f"{vocab_size}; set model.overrides.vocab_size={self.tokens.vocab_size} or choose a smaller tokenizer."
            )
        self.scoring = TextScoring()
        self.train_samples = TextSamples(Rows(self.tokens, recipe.data.seq_len))
        self.val_samples: TextSamples = TextSamples(Rows(val_tokens, recipe.data.seq_len, keep_tail=True))

    @staticmethod
    def _open_data(data: Data) -> tuple[Tokens, Tokens]:
        train = open_tokens(data, data.train_split)
        return (train, open_tokens(data, data.val_split)) if data.val_split else train.split(data.holdout)

    def losses(self, model: nn.Module, batch: Batch, *seed: int) -> Tensor:
        logits, router_loss = next_token_answer(model, batch)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        # Each row counts equally, so that neither passes nor processes need to know each other's numbers of targets;
        # rows differ by the few tokens that end a document.
        counted = (batch.targets != IGNORED).sum(1).clamp(min=1)
        losses = losses.view(batch.targets.shape).sum(1) / counted
        return losses if router_loss is None else losses + router_loss

    def write_record(self, folder: RunFolder, config: Any) -> None:
        ModelRecord(self.recipe.model.name, config, None, (), tokenizer=self.tokens.tokenizer).write(folder)

    @torch.no_grad()
    def illustrate(self, page: Page, model: nn.Module, accelerator: Accelerator, batch_size: int) -> None:
        """What the model writes after the beginnings of some held-out rows, always taking a likely next token."""
        tokenizer = load_tokenizer(self.tokens.tokenizer)
        rows = self.val_samples.rows
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for row in np.linspace(0, len(rows) - 1, min(_TEXTS, len(rows)), dtype=int):
            given = rows.read([int(row)])[0][0, : self.recipe.data.seq_len // 2].tolist()
            written = list(given)
            for _ in range(_WRITTEN):
                seen = torch.tensor([written[-self.recipe.data.seq_len :]])
                batch = Batch(seen, seen, torch.zeros(1), torch.arange(seen.shape[1])[None])
                batch = self.scoring.prepare(batch, accelerator.device)
                with accelerator.autocast():
                    logits = next_token_logits(model, batch)[0, -1].float().cpu()
                written.append(int(torch.multinomial((logits / 0.8).softmax(0), 1, generator=generator)))
            page.texts.append((tokenizer.decode(given), tokenizer.decode(written[len(given) :])))

    def data_hash(self) -> str:
        digest = hashlib.sha256(self.tokens.tokenizer.encode())
        for piece in self.tokens.pieces:
            digest.update(np.ascontiguousarray(piece).data)
        return digest.hexdigest()


def _make_model(recipe: Recipe, **options: Any) -> Any:
    torch.manual_seed(recipe.seed)  # for what is initialised afresh
    model: Any = create_model(
        recipe.model.name, recipe.model.pretrained, checkpoint=recipe.model.checkpoint or None, **options
    )
    if recipe.train.checkpoint_activations:
        enable = getattr(model, "set_grad_checkpointing", None) or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise RecipeError(f"{recipe.model.name} cannot checkpoint; set train.checkpoint_activations=false.")
        enable()
    return model


def open_tokens(data: Data, split: str, *, root: str = "") -> Tokens:
    """The tokens of a split: memory-mapped where `zoo data pack` made them, else made now, in memory.

    Raises:
        DataError: If the text cannot be read, or there is none.
    """
    place = Path(root or data.root or data.name).expanduser()
    if is_token_folder(place):
        return read_tokens(place, split)
    documents = open_documents(data.name, split=split, root=root or data.root, column=data.text_column)
    return tokenize(documents, data.tokenizer)


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


def open_split(
    data: Data, split: str, classes: tuple[str, ...], *, multi_label: bool = False, root: str = ""
) -> ImageSource:
    """A split to evaluate on, with its labels in the order of ``classes``; warns of classes that it has no sample of.

    Raises:
        DataError: If it cannot be read, has a class that is not among them, or has one label a picture where several
            are expected, or the reverse.
    """
    source = Relabelled(open_source(data.name, split=split, root=root or data.root), classes, f"Split {split!r}")
    if source.multi_label != multi_label:
        kinds = ("one label", "several labels")
        raise DataError(
            f"Split {split!r} has {kinds[source.multi_label]} a picture; expected {kinds[multi_label]}, as in training."
        )
    _warn_of_missing(source.labels, classes, f"Split {split!r}")
    return source


def _warn_of_missing(labels: np.ndarray, classes: tuple[str, ...], where: str) -> None:
    if missing := missing_classes(labels, classes):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        _logger.warning("%s has no sample of %d of %d classes: %s", where, len(missing), len(classes), shown)


def eval_samples(source: ImageSource, indices: np.ndarray, preprocessing: Preprocessing) -> ImageSamples:
    """Pictures as evaluation sees them."""
    return ImageSamples(source, indices, EvalTransform(preprocessing), seed=0)


def eval_loader(samples: Samples, recipe: Recipe, batch_size: int, accelerator: Accelerator) -> Loader:
    """Batches for evaluation: in order, every sample exactly once over all processes.

    Raises:
        RecipeError: If a process would have none.
    """
    if len(samples) < accelerator.num_processes:
        raise RecipeError(
            f"{accelerator.num_processes} processes are more than the {len(samples)} samples to evaluate on; start "
            "fewer, or raise data.holdout."
        )
    sampler = EpochSampler(
        len(samples), batch_size, shuffle=False, rank=accelerator.process_index, world=accelerator.num_processes
    )
    return Loader(samples, sampler, workers=recipe.data.workers, max_corrupt=recipe.data.max_corrupt)


TASKS: dict[str, type[Task]] = {"image-classification": ImageClassification, "language-modelling": LanguageModelling}
