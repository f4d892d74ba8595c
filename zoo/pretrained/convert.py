"""Weights in other layouts: the rules of ``converters/<family>.toml``, applied in either direction.

:func:`convert_file` is the only place that reads a pickle, restricted to tensors and plain containers.
"""

import argparse
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.atomic import save_safetensors
from zoo.config import ModelConfig
from zoo.errors import WeightsError
from zoo.pretrained.load import is_pickle, listed, load_state_dict
from zoo.registry import Family, family_name, get_config, get_family, split_name

# Where training scripts keep the state dict; averaged weights, which are the published ones, first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

_RULES = Path(__file__).with_name("converters")
_INDEX = re.compile(r"\{(\w+)(?:\+(\d+))?\}")
_CONFIG_NUMBER = re.compile(r"\{(\w+)\.(\d+)(?:\+(\d+))?\}")


def convert_state_dict(state_dict: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """A state dict under zoo's parameter names, whichever known layout it comes in.

    A state dict of zoo or timm is returned as it is, but for what zoo's modules compute. One of the authors' code is
    renamed; trailing dimensions of size 1 are added or removed, as in 1x1 convolutions stored as matrices. A training
    checkpoint is unwrapped first (averaged weights where it has both), and the prefix of ``DataParallel`` removed.

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under ``"model"``, ``"state_dict"``, ...
        name: The model they belong to, for example ``"efficientvit_m0"``.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If there is no state dict in it, or a key is not accounted for on either side.
    """
    state = unwrap(state_dict)
    family, model = _blueprint(name)
    own = model.state_dict()
    converter = _converter(family, model.config)
    if converter is None or is_zoo_layout(state, family):
        if converter is not None:
            state = {key: tensor for key, tensor in state.items() if not converter.is_computed(key)}
        _check_complete(state, own, name)
        return state
    renamed = {key: converter.to_zoo(key) for key in state if not converter.is_computed(key)}
    unknown = [key for key, new in renamed.items() if new not in own]
    missing = own.keys() - renamed.values()
    if unknown or missing:
        raise WeightsError(
            f"Not a state dict of the authors' {name}: {listed(unknown)} unknown, "
            f"{listed(key for key in own if key in missing)} missing."
        )
    return {new: _fit_trailing_ones(state[key], own[new]) for key, new in renamed.items() if new is not None}


def to_authors(state_dict: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The inverse of :func:`convert_state_dict`: zoo's names to those of the authors' code, which loads the result.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If a key is not one of the model's, one of the model's is missing, or the family has no other
            layout.
    """
    family, model = _blueprint(name)
    converter = _converter(family, model.config)
    if converter is None:
        raise WeightsError(f"{name}: the {family.name} family has no other layout than zoo's.")
    own = model.state_dict()
    _check_complete(state_dict, own, name)
    computed = {key: buffer for key, buffer in model.named_buffers() if key not in own}
    renamed = {key: converter.to_authors(key) for key in [*state_dict, *computed]}
    unknown = [key for key in state_dict if renamed[key] is None]
    if unknown:
        raise WeightsError(f"The authors' layout of {name} has no place for {listed(unknown)}.")
    return {
        new: converter.with_trailing_ones(new, state_dict[key] if key in state_dict else computed[key])
        for key, new in renamed.items()
        if new is not None and (key in state_dict or converter.is_computed(new))
    }


def is_zoo_layout(state: Iterable[str], family: Family) -> bool:
    """Whether these are zoo's parameter names; the first that only one of the two layouts has decides."""
    converter = _converter(family)
    if converter is None:
        return True
    for key in state:
        ours, theirs = converter.to_authors(key) is not None, converter.to_zoo(key) is not None
        if ours != theirs:
            return ours
    return True


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, or the state dict itself, without ``module.`` prefixes.

    Raises:
        WeightsError: If there is none.
    """
    state: Any = checkpoint
    for wrapper in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            state = checkpoint[wrapper]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"No state dict: expected tensors by name, perhaps under {', '.join(WRAPPERS)}.")
    while all(key.startswith("module.") for key in state):  # one for each wrapper
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return dict(state)


def convert_file(source: str | Path, target: str | Path, name: str) -> Path:
    """Convert a weight file, a pickle (``.pth``, ``.bin``) or safetensors, into safetensors under zoo's names.

    A pickle is read with PyTorch's restricted reader: one that would run code is refused. The target is written
    whole or not at all; the hash of the source is kept in its header.

    Args:
        source: The file to read.
        target: The safetensors file to write; replaced if it exists.
        name: The model it belongs to, for example ``"efficientvit_m0"``.

    Returns:
        The target.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If the source is missing, damaged or unsafe, or not this model's.
        OSError: If the target cannot be written.
    """
    source, target = Path(source), Path(target)
    checkpoint = _load_pickle(source) if is_pickle(source) else load_state_dict(source)
    # Cloned: tensors of a pickle may be views of one another, which safetensors does not store.
    tensors = {key: tensor.clone() for key, tensor in convert_state_dict(checkpoint, name).items()}
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model, _ = split_name(name)
    save_safetensors(tensors, target, {"zoo_version": zoo.__version__, "model": model, "source_sha256": digest})
    return target


def _load_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 -- restricted, see above
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{path}: not read, it is damaged or holds more than tensors ({reason})") from error


class _Renamer:
    """One direction of a family's rules: a name of one layout to the same entry's name in the other."""

    def __init__(
        self, names: Iterable[tuple[str, str]], inner: Iterable[tuple[str, str]], segments: Mapping[str, str]
    ) -> None:
        self.inner = _Renamer(inner, (), {}) if inner else None
        self.rules = [(_pattern(source), _INDEX.findall(source), target) for source, target in names]
        self.segments = segments
        self.foreign = set(segments.values()) - set(segments)  # parts that only the other layout has

    def __call__(self, name: str) -> str | None:
        """The other layout's name, None for a name that is not of this layout."""
        for pattern, indices, target in self.rules:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            numbers = {
                letter: int(number) - int(offset or 0)
                for (letter, offset), number in zip(indices, match.groups(), strict=False)  # the last may be the rest
            }
            if any(number < 0 for number in numbers.values()):
                continue
            renamed = _INDEX.sub(lambda index: str(numbers[index[1]] + int(index[2] or 0)), target)  # noqa: B023
            if not target.endswith("*"):
                return renamed
            inside = self.inner(match.groups()[-1]) if self.inner else None
            if inside is not None:
                return renamed[:-1] + inside
            rest = match.groups()[-1].split(".")
            if self.foreign.isdisjoint(rest):
                return renamed[:-1] + ".".join(self.segments.get(part, part) for part in rest)
        return None


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with a group for each index and one for the rest."""
    literal = re.escape(_INDEX.sub("\0", template.removesuffix("*")))
    return re.compile(literal.replace("\0", r"(\d+)") + ("(.+)" if template.endswith("*") else ""))


@dataclass(frozen=True)
class _Converter:
    """One family's rules, ready to apply."""

    to_zoo: _Renamer
    to_authors: _Renamer
    computed: tuple[str, ...]  # patterns
    trailing_ones: Mapping[str, int]  # by pattern

    def with_trailing_ones(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor under the authors' name for it, with the dimensions of size 1 that theirs ends with."""
        for pattern, count in self.trailing_ones.items():
            if fnmatchcase(key, pattern):
                return tensor.reshape(*tensor.shape, *(1,) * count)
        return tensor

    def is_computed(self, key: str) -> bool:
        """Whether zoo computes this entry of the authors' files."""
        return any(fnmatchcase(key, pattern) for pattern in self.computed)


@cache
def _converter(family: Family, config: ModelConfig | None = None) -> _Converter | None:
    """The rules of a family for one of its models (the first variant by default), None when it has no other layout."""
    path = _RULES / f"{family.name}.toml"
    if not path.is_file():
        return None
    if config is None:
        config = next(iter(family.variants.values()))()
    text = path.read_text(encoding="utf-8")
    document = tomllib.loads(
        _CONFIG_NUMBER.sub(lambda number: str(getattr(config, number[1])[int(number[2])] + int(number[3] or 0)), text)
    )
    names, inner, segments = document["names"], document.get("inner", []), document.get("segments", {})
    return _Converter(
        _Renamer(names, inner, segments),
        _Renamer(
            [(ours, theirs) for theirs, ours in names],
            [(ours, theirs) for theirs, ours in inner],
            {ours: theirs for theirs, ours in segments.items()},
        ),
        tuple(document.get("computed", ())),
        document.get("trailing_ones", {}),
    )


def _blueprint(name: str) -> tuple[Family, Any]:
    """A model's family, and the model on the meta device."""
    variant, _ = split_name(name)
    config = get_config(variant)
    family = get_family(family_name(variant))
    with torch.device("meta"):
        return family, family.model(config)


def _fit_trailing_ones(tensor: Tensor, own: Tensor) -> Tensor:
    """The tensor with as many trailing dimensions of size 1 as its counterpart in the model, if only that differs."""
    shorter, longer = sorted((tuple(tensor.shape), tuple(own.shape)), key=len)
    ones = (1,) * (len(longer) - len(shorter))
    return tensor.reshape(own.shape) if longer == shorter + ones else tensor


def _check_complete(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    unknown = [key for key in state if key not in own]
    missing = [key for key in own if key not in state]
    if unknown or missing:
        raise WeightsError(f"Not a state dict of {name}: {listed(unknown)} unknown, {listed(missing)} missing.")
