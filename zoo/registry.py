"""Families, their variants, and finding them by name. Imports no torch: families load when they are asked for."""

import fnmatch
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.config import ModelConfig
from zoo.errors import ConfigError, UnknownModelError, WeightsError, nearest, reason
from zoo.families import MODULES

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)
_ConfigFunction = TypeVar("_ConfigFunction", bound=Callable[[], ModelConfig])

TASKS = ("image-classification", "text-generation")
ENTRY_POINTS = "zoo.families"  # the group in which another package names its families, each as "module:FAMILY"


class Family:
    """Ties a config class to a model class and holds what is said once of the whole family.

    Args:
        name: The family's name, also the stem of its weights manifest and converter.
        config: The config dataclass.
        model: The module class; ``model(config)`` builds it, on the meta device too. Or where it is, as
            ``"module:name"``: it is then imported when it is first asked for, so that configs need no torch.
        title: The name as its authors write it.
        paper: Where it is described, for example ``"arXiv:2305.07027"``.
        code: The original repository and commit.
        licence: Licence of the original code, as an SPDX identifier.
        task: One of ``TASKS``.
        first_conv: Parameter prefix of the input layer, which other input channels replace.
        classifier: Parameter prefixes of the classifier, which another class count replaces.
        weights: A weights manifest that another package brings; zoo's own are in ``weights/``.
        converter: Likewise its rules for the authors' parameter names; zoo's own are in ``pretrained/converters/``.
        layout: In place of such rules, a function from a config to pairs of (authors' name, zoo's name), each perhaps
            ending in ``*``. Where several of the authors' names stand for one of zoo's, they are one shared tensor.
    """

    def __init__(
        self,
        name: str,
        *,
        config: type[ModelConfig],
        model: "Callable[[Any], nn.Module] | str",
        title: str,
        paper: str,
        code: str,
        licence: str,
        task: str = "image-classification",
        first_conv: str = "",
        classifier: str | tuple[str, ...] = "",
        weights: Path | None = None,
        converter: Path | None = None,
        layout: "Callable[[Any], list[tuple[str, str]]] | None" = None,
    ) -> None:
        self.name = name
        self.config = config
        self._model = model
        self.title = title
        self.paper = paper
        self.code = code
        self.licence = licence
        self.task = task
        self.first_conv = first_conv
        self.classifiers = (classifier,) if isinstance(classifier, str) else classifier
        self.weights = weights
        self.converter = converter
        self.layout = layout
        self.variants: dict[str, Callable[[], ModelConfig]] = {}

    def variant(self, function: _ConfigFunction) -> _ConfigFunction:
        """Decorator: registers a function that returns a config; its name is the variant's name."""
        self.variants[function.__name__] = function
        return function

    @property
    def model(self) -> "Callable[[Any], nn.Module]":
        """What builds the network from a config; its module loads now if it never did."""
        if isinstance(self._model, str):
            module, _, name = self._model.partition(":")
            return getattr(import_module(module), name)
        return self._model

    def __repr__(self) -> str:
        return f"Family({self.name!r}, {len(self.variants)} variants)"


_registered: dict[str, Family] = {}  # by family name; filled as modules load and as users register


def register(family: Family) -> Family:
    """Make a family's variants known to :func:`create_model` and its kin. Registering it again is harmless.

    Raises:
        ConfigError: If the family's name, or one of its variants, is taken by another family.
    """
    if _registered.get(family.name) is family:
        return family
    taken = set(MODULES) | set(_registered)
    if family.name in taken and MODULES.get(family.name) != family.config.__module__:
        raise ConfigError(f"A family named {family.name!r} is registered already; choose another name.")
    for variant in family.variants:
        owner = index().get(variant, {}).get("family", family.name)
        owner = next((other.name for other in _registered.values() if variant in other.variants), owner)
        if owner != family.name:
            raise ConfigError(f"Variant {variant!r} is registered by family {owner!r} already; choose another name.")
    _registered[family.name] = family
    return family


@cache
def index() -> dict[str, dict[str, Any]]:
    """Every built-in variant with its family, task, resolution and costs, from the generated ``models/index.json``."""
    return json.loads((Path(__file__).parent / "models" / "index.json").read_text())


def get_family(name: str) -> Family:
    """The family of this name, its module loaded.

    Raises:
        UnknownModelError: If there is none; names the nearest.
    """
    if name in MODULES and name not in _registered:
        register(import_module(MODULES[name]).FAMILY)
    if name not in _registered:
        _load_entry_points()
    if name not in _registered:
        raise UnknownModelError(f"Unknown family {name!r}.{nearest(name, {*MODULES, *_registered})}")
    return _registered[name]


def families() -> list[Family]:
    """The families loaded or registered so far, and those of installed packages; built-in ones load on first use."""
    _load_entry_points()
    return list(_registered.values())


def family_of(config: ModelConfig) -> Family:
    """The family whose config class this is."""
    for family in _registered.values():
        if type(config) is family.config:
            return family
    for name, module in MODULES.items():
        if type(config).__module__ == module:
            return get_family(name)
    raise ConfigError(f"{type(config).__name__} belongs to no registered family; call zoo.register(FAMILY) first.")


def config_of(model: "nn.Module") -> ModelConfig:
    """The config that a model was built from; a language model's ``config`` is transformers' view of it."""
    config: Any = model.config
    return config if isinstance(config, ModelConfig) else config.arch()


@cache
def _load_entry_points() -> None:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # whatever another package's modules raise
            _logger.warning("The entry point %r (%s) gives no family: %s", entry.name, entry.value, reason(error))


def _variants() -> dict[str, str]:
    """Variant name -> family name, of all that is known."""
    _load_entry_points()
    known = {variant: entry["family"] for variant, entry in index().items()}
    known.update((variant, family.name) for family in _registered.values() for variant in family.variants)
    return known


def split_name(name: str) -> tuple[str, str]:
    """``"efficientvit_m0.zoo_cifar10"`` -> ``("efficientvit_m0", "zoo_cifar10")``; the tag may be empty."""
    variant, _, tag = name.partition(".")
    return variant, tag


def is_model(name: str) -> bool:
    """Whether ``name``, with or without a ``.tag``, can be created."""
    try:
        _check_name(name)
    except (UnknownModelError, WeightsError):
        return False
    return True


def _check_name(name: str) -> tuple[str, str]:
    """Split a name into variant and tag, both known to exist."""
    if not isinstance(name, str):
        raise UnknownModelError(f"A model's name is {name!r}; expected a string, such as 'efficientvit_m0'.")
    variant, tag = split_name(name)
    if variant not in index():
        known = _variants()
        if variant not in known:
            hint = nearest(variant, known) or " `zoo list` shows all of them."
            if "/" in name or name.endswith((".safetensors", ".pth", ".pt", ".bin")):
                hint = " To load a file, name the architecture and pass checkpoint=PATH."
            raise UnknownModelError(f"Unknown model {name!r}.{hint}")
    if name.endswith("."):
        raise WeightsError(f"{name!r} names no weights after the dot. `zoo list --pretrained` shows all.")
    if tag:
        from zoo.pretrained.manifest import get_weights

        get_weights(name)
    return variant, tag


def family_name(variant: str) -> str:
    """The name of the family that a variant belongs to, without loading a built-in family's module."""
    return index()[variant]["family"] if variant in index() else _variants()[variant]


def get_config(name: str) -> ModelConfig:
    """The config of a variant; with a ``.tag``, as those weights need it (their classes, their resolution).

    Raises:
        UnknownModelError: For a name that is not registered, with the nearest ones.
        WeightsError: For a tag that the model does not have, with those it has.
    """
    variant, tag = _check_name(name)
    config = get_family(family_name(variant)).variants[variant]()
    if tag:
        from zoo.pretrained.manifest import get_weights

        config = config.override(**get_weights(name).config)
    return config


def list_models(pattern: str | Sequence[str] = "", *, pretrained: bool = False, task: str | None = None) -> list[str]:
    """Names of the registered models, in natural order.

    Args:
        pattern: One or several wildcard patterns (``"efficientvit*"``); empty for all.
        pretrained: List ``name.tag`` for every known set of weights instead of bare names, as timm does.
        task: Only models for this task, ``"image-classification"`` or ``"text-generation"``.

    Raises:
        ConfigError: For another task.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"task is {task!r}; expected one of {', '.join(TASKS)}.{nearest(task, TASKS)}")
    known = _variants()
    if pretrained:
        from zoo.pretrained.manifest import list_weights

        names: Iterable[str] = (entry.name for entry in list_weights())
    else:
        names = known
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    patterns = [entry for entry in patterns if entry]
    if patterns:
        names = [
            name
            for name in names
            if any(fnmatch.fnmatch(name, entry) or fnmatch.fnmatch(split_name(name)[0], entry) for entry in patterns)
        ]
    if task is not None:
        names = [name for name in names if _task(split_name(name)[0], known) == task]
    return sorted(names, key=natural_key)


def natural_key(name: str) -> list[int | str]:
    """Sort key under which ``m2`` comes before ``m10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _task(variant: str, known: Mapping[str, str]) -> str:
    return index()[variant]["task"] if variant in index() else _registered[known[variant]].task


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Rebuild a config from a mapping that names its ``"family"``, as :meth:`ModelConfig.to_json` writes it.

    Raises:
        ConfigError: If the family or one of the fields is missing, unknown or of the wrong type.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family is None:
        raise ConfigError('A config needs its "family", for example {"family": "efficientvit", ...}.')
    if not isinstance(family, str):
        raise ConfigError(f'"family" is {family!r}; expected a name, for example "efficientvit".')
    return get_family(family).config.from_dict(values)


def config_from_json(text: str) -> ModelConfig:
    """Rebuild a config from :meth:`ModelConfig.to_json`'s text."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"Not a config: invalid JSON at line {error.lineno}, column {error.colno}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Not a config: expected a JSON object, got {type(values).__name__}.")
    return config_from_dict(values)
