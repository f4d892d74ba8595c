"""Recipes: TOML files that say what is trained on what, and how. Imports no torch.

A recipe is resolved into a checked :class:`Recipe`; every unknown key and every wrong type is reported at once, with
the nearest valid key. A recipe may name one other as its ``base``, whose values it overrides. ``numbers = "paper"``
says that a file's values are those of a paper or of its authors' code, but for lines with the comment ``# ours``;
without it they are ours.
"""

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zoo.config import type_hints
from zoo.errors import RecipeError, require
from zoo.resources import folder

VERSION = 1  # of the format; a recipe that says a later one is refused


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    name: str = ""  # a variant, or variant.tag for its weights
    pretrained: bool = False
    checkpoint: str = ""  # a safetensors file to start from instead
    overrides: dict[str, Any] = field(default_factory=dict)  # config fields: drop_path_rate, img_size, ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it is trained on."""

    name: str = ""  # what zoo.data.sources.open_source takes: "digits", a folder, a file, or a Hub data set
    root: str = ""  # a local copy that stands for the name
    train_split: str = "train"
    val_split: str = ""  # looked at while training; empty: a part of the training split is held out
    test_split: str = ""  # evaluated by `zoo eval`; empty: what is looked at while training is all there is
    holdout: float = 0.1  # share of the training split held out, stratified, if there is no val_split
    streaming: bool = False  # read the training split of a Hub data set as it arrives, shuffled through a buffer
    samples: int = 0  # in an epoch of a stream; 0: as the Hub says
    max_corrupt: int = 0  # samples that may be unreadable: skipped, counted and listed in the report
    workers: int = 1  # processes that decode and augment
    pruning: str = ""  # samples left out of an epoch: "random", or "loss" for those that are learned already
    prune_fraction: float = 0.5  # share left out; with "loss", of those whose loss is below the mean
    text_column: str = "text"  # of JSONL, parquet and Hub data sets
    tokenizer: str = "bytes"  # "bytes", a tokenizer.json, or what transformers' AutoTokenizer takes
    seq_len: int = 1024  # tokens that a language model sees at once
    crop_pct: float = 0.0  # share of the resized picture that evaluation sees; 0: as the weights were trained
    interpolation: str = ""  # "bicubic", "bilinear" or "nearest"; empty: as the weights were trained


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training pictures are varied: the parts are timm's."""

    scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area that a random crop takes
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # its width over its height
    hflip: float = 0.5  # probability of a mirror image
    color_jitter: float = 0.0  # strength; not used together with auto_augment
    auto_augment: str = ""  # timm's notation, for example "rand-m9-mstd0.5-inc1"
    erasing: float = 0.0  # probability of erasing a random rectangle
    mixup: float = 0.0  # alpha of the beta distribution; 0 for none
    cutmix: float = 0.0
    smoothing: float = 0.0  # of the labels
    repeats: int = 1  # times a picture comes, each time varied anew, one right after the other (arXiv:1902.05509)
    interpolation: str = ""  # of training pictures alone: "random" is bilinear or bicubic; empty: as data.interpolation
    sizes: tuple[int, ...] = ()  # sides in pixels of which every batch is resized to one by chance; empty: as they are


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the answers cost."""

    name: str = "ce"  # "ce": cross-entropy, or "bce": binary cross-entropy of every class on its own, their mean
    class_weights: bool = False  # weigh samples by how rare their class is; of several labels, a yes over a no


@dataclass(frozen=True, kw_only=True)
class Distill:
    """A teacher whose answers are learned besides the labels."""

    teacher: str = ""  # a model with weights, "timm:NAME", a run folder, or "ema": the averaged weights; empty: none
    start: float = 0.0  # share of the training after which the teacher has its say
    kind: str = "soft"  # "soft": its probabilities, "hard": its best answer, "feature": how it tells samples apart
    alpha: float = 0.5  # share of the teacher in the loss; with "feature" or "ema", its weight besides the labels'
    temperature: float = 1.0  # of "soft"


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser, by timm's name for it."""

    name: str = "adamw"
    lr: float = 1e-3  # at the end of the warm-up
    lr_batch: int = 0  # the batch size that lr is meant for; 0: train.batch_size
    lr_rule: str = "linear"  # how lr grows with train.batch_size / lr_batch: "linear" or "sqrt"
    weight_decay: float = 0.05
    momentum: float = 0.9  # of SGD and RMSprop
    betas: tuple[float, ...] = ()  # of Adam and its kin: both decays of the moments; empty: the optimiser's own
    eps: float = 0.0  # added to the denominator; 0: the optimiser's own
    layer_decay: float = 1.0  # learning rate of each layer over that of the one after it
    clip: float = 0.0  # 0 for none
    clip_mode: str = "norm"  # "norm", "value", or "agc" for adaptive gradient clipping


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time, set at every step: :func:`zoo.train.schedule.learning_rate`."""

    epochs: int = 10
    name: str = "cosine"  # "cosine", "linear", "constant", "wsd" or "step"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    warmup_prefix: bool = False  # the rest's time starts when the warm-up ends, not with the training (timm's word)
    cooldown_epochs: int = 0  # of the epochs, the last ones, at min_lr
    min_lr: float = 1e-6
    decay_epochs: float = 1.0  # of "wsd": the last ones; of "step": between two steps
    decay_rate: float = 0.1  # of "step"
    start_size: int = 0  # side in pixels of training pictures at first; they grow to the model's
    grow_epochs: int = 0  # over so many epochs; 0: they have the model's size at once


@dataclass(frozen=True, kw_only=True)
class Train:
    """How the loop runs."""

    batch_size: int = 128  # samples per optimiser step, over all processes and passes
    micro_batch: int = (
        0  # most samples per process and pass, accumulated to the above; 0: no limit, -1: what memory has
    )
    precision: str = "fp32"  # "fp32", "bf16" or "fp16"
    channels_last: bool = True
    compile: bool = False  # with torch.compile
    checkpoint_activations: bool = False  # compute them again in the backward pass, for less memory
    # processes share the model or its optimiser's state out: "fsdp2", or DeepSpeed's "zero1", "zero2" or "zero3";
    # empty: each holds all, unless `accelerate config` says otherwise
    sharding: str = ""
    offload: bool = False  # with sharding: what is shared out waits in the host's memory
    tune: str = "all"  # what is trained: "all", "head" (a linear probe), or "lora" (as the lora section says)
    bn_momentum: float = 0.0  # of batch norms: share of a batch in the running statistics; 0: the model's own
    sync_bn: bool = False  # batch norms see the batch of all processes, not of theirs alone
    drop_path_grows: bool = False  # drop path rises from 0 to the model's rate in the course of the training
    ema: float = 0.0  # decay of the averaged weights; 0 for none
    ema_warmup: bool = True  # the decay rises to that, as 1 - (step + 1)^(-2/3), so that early averages are worth it
    patience: int = 0  # epochs without a better one after which the training ends; 0: never
    keep: str = "best"  # which epoch's weights become model.safetensors: "best" on the held-out part, or "last"
    save_steps: int = 0  # also checkpoint every so many optimiser steps, besides after every epoch
    tensorboard: bool = True  # write the figures of epochs and steps for TensorBoard into the run folder
    wandb: str = ""  # a project of Weights & Biases that they are logged to as well; empty: none
    log_every: int = 50  # of those two: optimiser steps from one row of loss, rate and gradient to the next; 0: no rows
    from_scratch: bool = False  # train once more without pretrained weights, and compare


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters of linear layers and 1 x 1 convolutions (arXiv:2106.09685); the classifier is trained whole."""

    rank: int = 8
    alpha: float = 16.0  # the adapters' outputs are multiplied by alpha / rank
    dropout: float = 0.0  # of the adapters' inputs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe. Written into every run folder, from which alone a run can be resumed and evaluated."""

    version: int = VERSION
    task: str = "image-classification"  # or "language-modelling"
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    distill: Distill = field(default_factory=Distill)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    lora: Lora = field(default_factory=Lora)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The whole recipe, every value explicit."""
        return require("tomli_w", extra="train", why="Writing a recipe").dumps(self.to_dict())

    def replace(self, **values: Any) -> "Recipe":
        """A copy with some values replaced, by dotted name: ``replace(**{"model.pretrained": False})``."""
        merged = self.to_dict()
        for key, value in values.items():
            _set(merged, key, value)
        return resolve(merged, "recipe")


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge with its base, override and check a recipe.

    Args:
        recipe: A TOML file, or the name of one that zoo ships (``"quickstart"``, ``"cifar10/efficientvit_m0"``).
        overrides: ``"section.key=value"`` strings; the value is TOML, or else taken as text.

    Raises:
        RecipeError: If it cannot be found or parsed, or has unknown keys or wrong values (all are listed).
    """
    layers = read_layers(recipe)
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merge(values, layer.values)
    for key, value in parse_overrides(overrides):
        _set(values, key, value)
    return resolve(values, str(layers[-1].path))


@dataclass(frozen=True)
class Layer:
    """What one file of a recipe says."""

    path: Path
    values: dict[str, Any]
    numbers: str  # "paper" if its values are those of a paper or its authors' code, except where marked; else "ours"


def read_layers(recipe: str | Path) -> list[Layer]:
    """The files that a recipe consists of: its base, if it has one, and itself. Arguments and errors as above."""
    layer, base = _read_layer(find_recipe(recipe))
    if base is None:
        return [layer]
    below, deeper = _read_layer(_find_base(layer.path, base))
    if deeper is not None:
        raise RecipeError(f"{layer.path}: its base {below.path} has a base itself; one level is all there is.")
    return [below, layer]


def _read_layer(path: Path) -> tuple[Layer, Any]:
    """A file without the two keys that are about it; the second is the name of its base, if it has one."""
    values = _read(path)
    base, numbers = values.pop("base", None), values.pop("numbers", "ours")
    if numbers not in ("paper", "ours"):
        raise RecipeError(f"{path}: numbers is {numbers!r}, expected 'paper' or 'ours'.")
    return Layer(path, values, numbers), base


def parse_overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """``"section.key=value"`` strings as (dotted name, value).

    Raises:
        RecipeError: If one of them is something else.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"Override {override!r}: expected section.key=value, such as optim.lr=1e-3.")
        yield key.strip(), parse_value(text.strip())


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as the name of one that zoo ships."""
    path = Path(recipe)
    if path.is_file():
        return path
    name = str(recipe).removesuffix(".toml").removeprefix("recipes/")
    shipped = folder("recipes") / f"{name}.toml"
    if shipped.is_file():
        return shipped
    matches = difflib.get_close_matches(name, list_recipes(), n=3, cutoff=0.0)
    raise RecipeError(f"No recipe {str(recipe)!r}: neither a file nor a name. Nearest: {', '.join(matches)}.")


def _find_base(recipe: Path, name: Any) -> Path:
    """A recipe's base: a file beside it, or else what :func:`find_recipe` finds."""
    if not isinstance(name, str):
        raise RecipeError(f"{recipe}: base is {name!r}, expected the name of a recipe.")
    sibling = recipe.parent / f"{name.removesuffix('.toml')}.toml"
    try:
        return sibling if sibling.is_file() else find_recipe(name)
    except RecipeError as error:
        raise RecipeError(f"{recipe}: its base is missing. {error}") from error


def list_recipes() -> list[str]:
    """Names of the recipes that zoo ships; what is only a base for others is in ``_base`` and not among them."""
    root = folder("recipes")
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml"))
    return sorted(name for name in names if not name.startswith("_"))


def resolve(values: Mapping[str, Any], origin: str) -> Recipe:
    """A checked :class:`Recipe` from nested values; ``origin`` begins the error message.

    Raises:
        RecipeError: Naming every unknown key and every value of the wrong type or range.
    """
    problems: list[str] = []
    version = values.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(f"{origin} has the format {version}, this zoo reads up to {VERSION}; upgrade efficient-zoo.")
    recipe = _build(Recipe, values, "", problems)
    if not problems:
        problems = _check(recipe)
    if problems:
        raise RecipeError(f"{origin}: {'; '.join(problems)}.")
    return recipe


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = type_hints(cls)
    known = {spec.name for spec in fields(cls)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{prefix}{key}"
        if key not in known:
            close = [full for full in _all_keys() if full.rpartition(".")[2] == key]  # right, but in another table
            close = close or [f"{prefix}{name}" for name in difflib.get_close_matches(key, known, n=2)]
            problems.append(f"unknown key {where}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                arguments[key] = _build(typing.cast(type, hints[key]), value, f"{where}.", problems)
            else:
                problems.append(f"{where} is {value!r}, expected a table")
        else:
            try:
                arguments[key] = _coerce(value, hints[key])
            except TypeError:
                problems.append(f"{where} is {value!r}, expected {_describe(hints[key])}")
    return cls(**arguments)


def _coerce(value: Any, annotation: Any) -> Any:
    """``value`` as the annotation wants it: integers serve as floats and lists as tuples; else TypeError."""
    if typing.get_origin(annotation) is tuple:
        kinds = typing.get_args(annotation)
        if not isinstance(value, list | tuple):
            raise TypeError
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise TypeError
        return tuple(_coerce(item, kind) for item, kind in zip(value, kinds, strict=True))
    if typing.get_origin(annotation) is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise TypeError
    return value


def _describe(annotation: Any) -> str:
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if typing.get_origin(annotation) is dict:
        return "a table"
    if typing.get_origin(annotation) is tuple:
        kinds = typing.get_args(annotation)
        if kinds[-1] is ...:
            return "a list of integers" if kinds[0] is int else "a list of numbers"
        return f"a list of {len(kinds)} numbers"
    return words[annotation]


def _are_betas(values: tuple[float, ...]) -> bool:
    return len(values) in (0, 2) and all(0 <= value < 1 for value in values)


# what is expected, whether a value is that, and the keys it holds for
_RULES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "0 or more",
        lambda value: 0 <= value < math.inf,
        (
            "seed",
            "data.samples",
            "data.max_corrupt",
            "data.workers",
            "augment.color_jitter",
            "distill.alpha",
            "optim.lr_batch",
            "schedule.start_size",
            "schedule.grow_epochs",
            "optim.eps",
            "schedule.cooldown_epochs",
            "train.patience",
            "lora.alpha",
            "augment.mixup",
            "augment.cutmix",
            "optim.weight_decay",
            "optim.clip",
            "schedule.warmup_epochs",
            "schedule.warmup_lr",
            "schedule.min_lr",
            "train.save_steps",
            "train.log_every",
        ),
    ),
    (
        "1 or more",
        lambda value: value >= 1,
        ("version", "schedule.epochs", "train.batch_size", "data.seq_len", "augment.repeats", "lora.rank"),
    ),
    ("0 or more, or -1", lambda value: value >= -1, ("train.micro_batch",)),
    ("sides of 32 or more", lambda value: all(side >= 32 for side in value), ("augment.sizes",)),
    (
        "more than 0",
        lambda value: 0 < value < math.inf,
        ("optim.lr", "distill.temperature", "schedule.decay_epochs", "schedule.decay_rate"),
    ),
    ("0 to 1", lambda value: 0 <= value <= 1, ("data.crop_pct", "augment.hflip", "augment.erasing")),
    (
        "0 or more, less than 1",
        lambda value: 0 <= value < 1,
        (
            "augment.smoothing",
            "optim.momentum",
            "train.ema",
            "data.prune_fraction",
            "distill.start",
            "lora.dropout",
            "train.bn_momentum",
        ),
    ),
    ("more than 0, less than 1", lambda value: 0 < value < 1, ("data.holdout",)),
    ("more than 0, at most 1", lambda value: 0 < value <= 1, ("optim.layer_decay",)),
    ("empty, or two of 0 or more, less than 1", _are_betas, ("optim.betas",)),
    ("two shares of 1, the smaller first", lambda value: 0 < value[0] <= value[1] <= 1, ("augment.scale",)),
    ("two ratios, the smaller first", lambda value: 0 < value[0] <= value[1] < math.inf, ("augment.ratio",)),
)
_ZERO = ("zero1", "zero2", "zero3")
_ELEMENTWISE = ("adam", "adamw", "sgd", "momentum", "rmsproptf", "rmsprop", "lion")  # each value is updated by itself

_CHOICES = {
    "task": ("image-classification", "language-modelling"),
    "data.pruning": ("", "random", "loss"),
    "augment.interpolation": ("", "random", "bicubic", "bilinear", "nearest"),
    "loss.name": ("ce", "bce"),
    "distill.kind": ("soft", "hard", "feature"),
    "optim.lr_rule": ("linear", "sqrt"),
    "schedule.name": ("cosine", "linear", "constant", "wsd", "step"),
    "data.interpolation": ("", "bicubic", "bilinear", "nearest"),
    "optim.clip_mode": ("norm", "value", "agc"),
    "train.tune": ("all", "head", "lora"),
    "train.keep": ("best", "last"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.sharding": ("", "fsdp2", *_ZERO),
}


def _zero_problems(recipe: Recipe) -> list[str]:
    """What DeepSpeed does not do: it updates a group of parameters as one tensor, of which each process has a part."""
    optim, train = recipe.optim, recipe.train
    problems = []
    if optim.name not in _ELEMENTWISE:
        problems.append(f"optim.name is {optim.name!r}, expected one of {', '.join(_ELEMENTWISE)} with DeepSpeed")
    if optim.clip and optim.clip_mode != "norm":
        problems.append(f"optim.clip_mode is {optim.clip_mode!r}, expected 'norm' with DeepSpeed")
    if train.precision == "fp16":
        problems.append("train.precision is 'fp16', expected 'bf16' or 'fp32' with DeepSpeed")
    return problems


def _check(recipe: Recipe) -> list[str]:
    """What a type alone does not say."""
    values = dict(leaves(recipe))
    problems = []
    for expected, holds, keys in _RULES:
        problems += [f"{key} is {_show(values[key])}, expected {expected}" for key in keys if not holds(values[key])]
    for key, allowed in _CHOICES.items():
        if values[key] not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed if choice)
            problems.append(f"{key} is {values[key]!r}, expected {choices}")
    model, schedule, data, distill = recipe.model, recipe.schedule, recipe.data, recipe.distill
    if not model.name:
        problems.append("model.name is empty, expected a model (`zoo list` shows them)")
    if not recipe.data.name:
        problems.append("data.name is empty, expected a data set")
    if data.streaming and not data.val_split:
        problems.append("data.streaming cannot hold a part out, expected data.val_split")
    if data.streaming and (data.pruning or recipe.task == "language-modelling"):
        problems.append("data.streaming serves pictures, none of them pruned; pack text with `zoo data pack`")
    if schedule.grow_epochs and schedule.start_size < 32:
        problems.append(f"schedule.start_size is {schedule.start_size}, expected 32 or more with schedule.grow_epochs")
    if schedule.name == "wsd" and schedule.decay_epochs + schedule.warmup_epochs > schedule.epochs:
        problems.append(
            f"schedule.decay_epochs is {schedule.decay_epochs:g}, expected at most the {schedule.epochs} epochs less "
            "the warm-up"
        )
    if distill.teacher == "ema" and (distill.kind != "soft" or not recipe.train.ema):
        problems.append("distill.teacher is 'ema', expected distill.kind='soft' and train.ema with it")
    if distill.teacher not in ("", "ema") and distill.kind != "feature" and distill.alpha > 1:
        problems.append(f"distill.alpha is {distill.alpha:g}, expected 0 to 1")
    if schedule.cooldown_epochs + schedule.warmup_epochs > schedule.epochs - 1 and schedule.cooldown_epochs:
        problems.append(
            f"schedule.cooldown_epochs is {schedule.cooldown_epochs}, expected less than the {schedule.epochs} epochs "
            "less the warm-up"
        )
    if data.streaming and recipe.augment.repeats > 1:
        problems.append("data.streaming reads a picture once, expected augment.repeats=1")
    if recipe.train.tune != "all" and recipe.train.sharding:
        problems.append("train.sharding shares out models that are trained whole, expected train.tune='all'")
    if recipe.train.offload and not recipe.train.sharding:
        problems.append("train.offload goes with train.sharding, expected 'fsdp2' or 'zero1' to 'zero3' there")
    if recipe.train.sharding in _ZERO:
        problems += _zero_problems(recipe)
    if recipe.train.sharding and recipe.optim.clip and recipe.optim.clip_mode == "agc":
        problems.append("optim.clip_mode is 'agc', which needs whole parameters; expected 'norm' with train.sharding")
    if recipe.train.patience and recipe.train.keep == "last":
        problems.append("train.patience waits for a better epoch, expected train.keep='best'")
    if recipe.train.tune != "all" and not (model.pretrained or model.checkpoint):
        problems.append(f"train.tune is {recipe.train.tune!r}, which needs weights to start from; set model.pretrained")
    if model.pretrained and model.checkpoint:
        problems.append("model has both pretrained and checkpoint, expected one of them")
    if recipe.train.from_scratch and not (model.pretrained or model.checkpoint):
        problems.append(
            "train.from_scratch compares with pretrained weights, but model has neither those nor a checkpoint"
        )
    if schedule.warmup_epochs and schedule.warmup_epochs >= schedule.epochs:
        problems.append(
            f"schedule.warmup_epochs is {schedule.warmup_epochs:g}, expected less than the {schedule.epochs} epochs"
        )
    return problems


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a recipe with its dotted name."""
    for spec in fields(part):
        value = getattr(part, spec.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", value


def _all_keys() -> list[str]:
    sections = [spec.name for spec in fields(Recipe) if dataclasses.is_dataclass(getattr(Recipe(), spec.name))]
    return [*sections, *(key for key, _ in leaves(Recipe()))]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise RecipeError(f"Cannot read {path}: {error.strerror}.") from error


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"Override {key!r}: {parent!r} is not a table.")
        values = inner
    values[last] = value


def parse_value(text: str) -> Any:
    """What a value of a command line's ``key=value`` means, as TOML has it; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # plain words need no quotes on a command line
