"""Which weights there are: one TOML manifest per family in ``weights/``, read into records. Imports no torch.

The format is described at the top of ``weights/efficientvit.toml``.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from zoo.config import ModelConfig, type_hints
from zoo.errors import WeightsError, nearest
from zoo.preprocessing import Preprocessing
from zoo.registry import families, get_config, is_model, split_name
from zoo.resources import folder

IMAGENET_LABELS = "imagenet-1k"
LABEL_SETS = (IMAGENET_LABELS, "imagenet-12k")  # each stands for its standard class names in their standard order
LAYOUTS = ("timm", "zoo", "authors")

_TAG = re.compile(r"[a-z0-9_]+")
_FILE = re.compile(r"(?!\.)[\w.-]+\.(safetensors|pth|pt|bin|tar)")
_PICKLES = (".pth", ".pt", ".bin", ".tar")
REPOSITORY = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")
REVISION = re.compile(r"(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*")
_HTTPS = re.compile(r"https://[^\s/]+/\S+")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A published figure: accuracy of pictures, in percent, or mean cross-entropy of text, in nats a token."""

    dataset: str
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    source: str

    @property
    def words(self) -> str:
        """``"top-1 63.2 %, top-5 85.2 %"`` or ``"loss 1.52"``."""
        figures = {"top-1": (self.top1, " %"), "top-5": (self.top5, " %"), "loss": (self.loss, "")}
        return ", ".join(f"{name} {value:g}{unit}" for name, (value, unit) in figures.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One set of weights: where its file is, what it needs and what is known of it."""

    family: str
    model: str
    tag: str
    folder: Path  # of the manifest, and of a packaged file
    hub: str = ""  # repository on the Hugging Face Hub; "" for a packaged file
    revision: str = "main"  # of that repository
    url: str = ""  # of a file that is neither on the Hub nor packaged
    page: str = ""  # where a person gets a file that has no address of its own
    file: str = "model.safetensors"
    sha256: str = ""  # "" when unknown
    licence: str
    layout: str  # whose parameter names the file has: "timm" and "zoo" are the same, "authors" is converted
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)  # config fields that these weights need
    preprocessing: Preprocessing = Preprocessing()  # noqa: RUF009 -- immutable
    labels: tuple[str, ...] | str = IMAGENET_LABELS
    multi_label: bool = False  # whether a picture may be of several classes
    tokenizer: str = ""  # of text: what zoo.data.tokens.load_tokenizer takes
    metrics: tuple[Metric, ...] = ()
    check: tuple[
        float, ...
    ] = ()  # first logits of the picture that zoo.pretrained.verify makes, recorded when known good
    recipe: str = ""  # one of zoo's recipes, "unknown", or "" when the authors' card says how
    notes: str = ""  # hardware, seed, and what else should be known

    @property
    def name(self) -> str:
        """``"model.tag"``, as :func:`zoo.create_model` takes it; without a tag for weights that no manifest lists."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def packaged(self) -> bool:
        """Whether the file travels with the package instead of being on the Hub."""
        return not (self.hub or self.url or self.page)

    @property
    def pickled(self) -> bool:
        """Whether the file is the authors' pickle, which is converted once before it is loaded."""
        return bool(self.page) or self.file.endswith(_PICKLES)

    @property
    def place(self) -> str:
        """Where the file comes from, for people."""
        return f"Hub: {self.hub}" if self.hub else self.url or self.page or "the package"

    @property
    def model_config(self) -> ModelConfig:
        """The config of the model that these weights fit."""
        return get_config(self.model).override(**self.config)

    @property
    def path(self) -> Path:
        """Where a packaged file is."""
        return self.folder / self.file

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes in order; None for those of a standard set."""
        return None if isinstance(self.labels, str) else self.labels


def list_weights(model: str = "") -> list[Weights]:
    """Every known set of weights, or those of one model with its default first.

    Raises:
        WeightsError: If a manifest is malformed; names the file, the entry and the key.
    """
    paths = [*sorted(folder("weights").glob("*.toml")), *(family.weights for family in families() if family.weights)]
    entries = (entry for path in paths for entry in _read(path))
    return [entry for entry in entries if not model or entry.model == model]


def get_weights(name: str) -> Weights:
    """The weights called ``"model.tag"``, or a model's default ones for ``"model"``.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If the model has no such tag, with those it has; or no weights at all.
    """
    model, tag = split_name(name)
    entries = list_weights(model)
    if not entries:
        if not is_model(model):
            get_config(model)  # raises, with the nearest names
        raise WeightsError(f"{model} has no pretrained weights. `zoo list --pretrained` shows the models that have.")
    if not tag:
        return entries[0]
    for entry in entries:
        if entry.tag == tag:
            return entry
    tags = [entry.tag for entry in entries]
    joined = f"{model}{tag}"  # the paper's LowFormer-B1.5 is lowformer_b15
    hint = f" Did you mean: {joined}?" if is_model(joined) else nearest(tag, tags)
    raise WeightsError(f"{model} has no weights tagged {tag!r}; it has: {', '.join(tags)}.{hint}")


@cache
def _read(path: Path) -> tuple[Weights, ...]:
    """The entries of one manifest, in its order."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise WeightsError(f"{path}: cannot be read as TOML: {error}") from error
    defaults = document.pop("defaults", {})
    entries = []
    for model, tags in document.items():
        if not _is_table_of_tables(tags):
            raise WeightsError(f"{path}: {model} must be a table of tags, as in [{model}.some_tag].")
        for tag, values in tags.items():
            try:
                entries.append(_entry(path, model, tag, _merge(defaults, values)))
            except (WeightsError, TypeError) as error:
                raise WeightsError(f"{path}: {model}.{tag}: {error}") from error
    return tuple(entries)


def _entry(path: Path, model: str, tag: str, values: dict[str, Any]) -> Weights:
    given = ("family", "model", "tag", "folder")
    if not _TAG.fullmatch(tag):
        raise WeightsError("a tag consists of lower-case letters, digits and underscores.")
    _check_keys(Weights, values, omit=given)
    if "preprocessing" in values:
        values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
    if "metrics" in values:
        for metric in values["metrics"]:
            _check_keys(Metric, metric)
            if "top1" not in metric and "loss" not in metric:
                raise WeightsError("a metric has neither top1 nor loss.")
        values["metrics"] = tuple(Metric(**metric) for metric in values["metrics"])
    if "check" in values:
        numbers = values["check"]
        if not isinstance(numbers, list) or not all(isinstance(number, int | float) for number in numbers):
            raise WeightsError("check must be a list of numbers.")
        values["check"] = tuple(map(float, numbers))
    if isinstance(values.get("labels"), list):
        values["labels"] = tuple(values["labels"])
    weights = Weights(family=path.stem, model=model, tag=tag, folder=path.parent, **values)
    _check_values(weights)
    return weights


def _check_values(weights: Weights) -> None:
    def expect(name: str, condition: object, expected: str) -> None:
        if not condition:
            raise WeightsError(f"{name} is {getattr(weights, name)!r}; expected {expected}.")

    places = [name for name in ("hub", "url", "page") if getattr(weights, name)]
    if len(places) > 1:
        raise WeightsError(f"{' and '.join(places)} are given; expected one place, or none for a packaged file.")
    expect("file", _FILE.fullmatch(weights.file), "the name of a .safetensors, .pth, .pt, .bin or .tar file, no folder")
    for name in ("url", "page"):
        expect(name, not getattr(weights, name) or _HTTPS.fullmatch(getattr(weights, name)), "an https address")
    if weights.pickled and weights.packaged:
        raise WeightsError(f"file is {weights.file!r}; expected .safetensors, since a packaged file is never a pickle.")
    if weights.url and not weights.pickled:
        expect("sha256", weights.sha256, "that of the file, which a url needs")
    expect("hub", not weights.hub or REPOSITORY.fullmatch(weights.hub), "owner/name")
    expect("revision", REVISION.fullmatch(weights.revision), "a branch, tag or commit")
    expect("sha256", not weights.sha256 or SHA256.fullmatch(weights.sha256), "64 hexadecimal digits in lower case")
    expect("layout", weights.layout in LAYOUTS, " or ".join(map(repr, LAYOUTS)))
    expect("config", isinstance(weights.config, dict), "a table")
    if isinstance(weights.labels, str):
        expect(
            "labels", weights.labels in LABEL_SETS, f"a list of class names, or {' or '.join(map(repr, LABEL_SETS))}"
        )
    else:
        expect("labels", all(isinstance(label, str) for label in weights.labels), "names")
        classes = weights.config.get("num_classes", len(weights.labels))
        expect("labels", len(weights.labels) == classes, f"one name for each of config.num_classes = {classes}")


def _check_keys(record: type, values: Mapping[str, Any], omit: Iterable[str] = ()) -> None:
    """Raise for keys that the record does not have, keys that it needs, and plain values of the wrong type."""
    if not isinstance(values, dict):
        raise WeightsError(f"{values!r} is no table.")
    specs = {spec.name: spec for spec in fields(record) if spec.name not in omit}
    hints = type_hints(record)
    for key, value in values.items():
        if key not in specs:
            raise WeightsError(f"unknown key {key!r}.{nearest(key, specs)}")
        if hints[key] is str and not isinstance(value, str):
            raise WeightsError(f"{key} is {value!r}; expected a string.")
        if hints[key] in (float, float | None) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise WeightsError(f"{key} is {value!r}; expected a number.")
    for key, spec in specs.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise WeightsError(f"the key {key!r} is missing.")


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``, tables merged key by key."""
    merged = {**defaults, **values}
    for key in defaults.keys() & values.keys():
        if isinstance(defaults[key], dict) and isinstance(values[key], dict):
            merged[key] = {**defaults[key], **values[key]}
    return merged
