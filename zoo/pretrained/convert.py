"""Weights in other layouts: the rules of ``converters/<family>.toml``, applied in either direction.

:func:`convert_file` is the only place that reads a pickle, restricted to tensors and plain containers.
"""

import argparse
import json
import re
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import zoo
from zoo.atomic import save_safetensors
from zoo.config import ModelConfig
from zoo.errors import WeightsError, reason
from zoo.pretrained.files import sha256_of
from zoo.pretrained.load import check_finite, is_pickle, listed, load_state_dict, walk
from zoo.pretrained.manifest import get_weights
from zoo.registry import Family, config_of, family_name, get_config, get_family, split_name

# Where training scripts keep the state dict; averaged weights, which are the published ones, first.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "module")

# What DataParallel and averaged models, and torch.compile, put in front of every name.
PREFIXES = ("module.", "_orig_mod.")

_RULES = Path(__file__).with_name("converters")
_INDEX = re.compile(r"\{(\w+)(?:\+(\d+))?\}")
_CONFIG_NUMBER = re.compile(r"\{(\w+)\.(\d+)(?:\+(\d+))?\}")


def convert_state_dict(state_dict: Mapping[str, Any], name: str, **overrides: Any) -> dict[str, Tensor]:
    """A state dict under zoo's parameter names, whichever known layout it comes in.

    The layouts are zoo's, timm's (the same names), and that of the authors' code, which is renamed; trailing
    dimensions of size 1 are added or removed, as in 1x1 convolutions stored as matrices. A training checkpoint is
    unwrapped first (averaged weights where it has both), and the prefixes of ``DataParallel`` and ``torch.compile``
    removed. Where every batch norm was folded into the layer beside it, identities take their places, so that the
    outputs stay the same.

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under ``"model"``, ``"state_dict"``, ...
        name: The model they belong to, for example ``"efficientvit_m0"``; with a tag, as its weights need it.
        **overrides: Fields of the config in which the model differs from that, for example ``num_classes=10``.

    Raises:
        UnknownModelError: If there is no such model.
        ConfigError: If an override is not a field of the config.
        WeightsError: If there is no state dict in it, a key is not accounted for on either side, or a shape differs;
            also for what ``fuse()`` made, which merges more than batch norms.
    """
    state = unwrap(state_dict)
    family, model = _blueprint(name, overrides)
    own = model.state_dict()
    found = _recognise(state, family, model)
    unknown = [*found.unknown, *(found.origin.get(key, key) for key in found.state if key not in own)]
    missing = [key for key in own if key not in found.state]
    if (unknown or missing) and hasattr(model, "fuse") and model.fuse().state_dict().keys() == state.keys():
        raise WeightsError(
            f"These are the weights of {name} after fuse(), which no other form of it can load; expected those before, "
            f"or load them with zoo.create_model({name!r}).fuse().load_state_dict(...)."
        )
    if unknown or missing:
        raise WeightsError(
            f"Not a state dict of {found.owner}{name}: {listed(unknown)} unknown, {listed(missing)} missing."
            f"{_if_fused(state, own)}"
        )
    for key, tensor in found.state.items():
        if own[key].is_floating_point() and not tensor.is_floating_point():
            raise WeightsError(f"{found.origin.get(key, key)} is {tensor.dtype}, expected {own[key].dtype}.")
        if tensor.shape != own[key].shape:
            raise WeightsError(
                f"Not a state dict of {found.owner}{name}: {found.origin.get(key, key)} is {list(tensor.shape)}, "
                f"expected {list(own[key].shape)}. A model of other classes or another size needs its config fields, "
                f"for example num_classes=10.{_if_fused(state, own)}"
            )
    return found.state


def _if_fused(state: Iterable[str], own: Iterable[str]) -> str:
    """What to say of a state dict without batch norms that does not fit a model with them."""
    statistic = "running_var"
    if any(key.endswith(statistic) for key in state) or not any(key.endswith(statistic) for key in own):
        return ""
    return " It has no batch norms, as after fuse(), which merges more than can be taken apart: save it before."


def adapt_layout(state_dict: Mapping[str, Tensor], family: Family, model: nn.Module) -> dict[str, Tensor]:
    """As :func:`convert_state_dict`, for a model of perhaps other classes, channels or size: its loader checks shapes.

    Args:
        state_dict: Tensors by name.
        family: The model's family.
        model: The model, which may be on the meta device.

    Raises:
        WeightsError: If it is the authors' layout, but for some keys.
    """
    found = _recognise(state_dict, family, model)
    if found.unknown:
        raise WeightsError(f"Not a state dict of {found.owner}{family.title}: {listed(found.unknown)} unknown.")
    return found.state


def to_authors(state_dict: Mapping[str, Tensor], name: str, **overrides: Any) -> dict[str, Tensor]:
    """The inverse of :func:`convert_state_dict`: zoo's names to those of the authors' code, which loads the result.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If a key is not one of the model's, one of the model's is missing, or the family has no other
            layout.
    """
    family, model = _blueprint(name, overrides)
    converter = _converter(family, config_of(model))
    if converter is None:
        raise WeightsError(f"{name}: the {family.name} family has no other layout than zoo's.")
    own = model.state_dict()
    unknown = [key for key in state_dict if key not in own]
    missing = [key for key in own if key not in state_dict]
    if unknown or missing:
        raise WeightsError(f"Not a state dict of {name}: {listed(unknown)} unknown, {listed(missing)} missing.")
    # What zoo computes, in buffers that are in no file, the authors' files have.
    computed = {key: buffer for key, buffer in model.named_buffers() if key not in own}
    renamed, origin, unknown = converter.to_authors.apply({**state_dict, **computed}, {})
    unknown = [key for key in unknown if key in own]
    if unknown:
        raise WeightsError(f"The authors' layout of {name} has no place for {listed(unknown)}.")
    theirs = {
        key: converter.reshaped(key, tensor)
        for key, tensor in renamed.items()
        if origin[key] not in computed or converter.is_computed(key)
    }
    return converter.with_copies(theirs)


@dataclass(frozen=True)
class _Recognised:
    """A state dict under zoo's names, as far as its keys could be placed."""

    state: dict[str, Tensor]
    owner: str  # "the authors' " when it is in their layout
    origin: Mapping[str, str]  # zoo's name -> the name it came under, where they differ
    unknown: list[str]


def _recognise(state: Mapping[str, Tensor], family: Family, model: nn.Module) -> _Recognised:
    """Find out which layout this is, and bring it into zoo's."""
    converter = _converter(family, config_of(model))
    if converter is not None:
        state = {key: tensor for key, tensor in state.items() if not converter.is_computed(key)}
        if converter.copies and model.state_dict().keys() >= state.keys():
            return _Recognised(dict(state), "", {}, [])  # zoo's, though one of the names may be a copy's in theirs
        state = converter.without_copies(state)
    if converter is None or converter.is_zoo_layout(state):
        return _Recognised(_unfold_batch_norms(dict(state), model), "", {}, [])
    own = model.state_dict()
    permuted = {key: converter.permuted(key, tensor) for key, tensor in state.items()}
    renamed, origin, unknown = converter.to_zoo.apply(permuted, {key: tensor.shape for key, tensor in own.items()})
    unfolded = _unfold_batch_norms(renamed, model)
    fitted = {key: _fit_trailing_ones(tensor, own[key]) if key in own else tensor for key, tensor in unfolded.items()}
    return _Recognised(fitted, "the authors' ", origin, unknown)


def _unfold_batch_norms(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Put identities in the places of batch norms that are missing because they were folded, each into its neighbour.

    Two ways of folding are known: the layer that does both stands under the name of the pair, or under its own, with a
    bias. A bias that it did not have shows that it was folded; otherwise, that there is no batch norm left at all.
    """
    norms = {prefix[:-1] for prefix, module in walk(model) if isinstance(module, _BatchNorm)}
    folded = {path for path in norms if f"{path}.running_var" not in state}
    if not folded:
        return state
    own = model.state_dict()
    layer = ""  # the last convolution or linear layer before the norm
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = path
        if path not in folded:
            continue
        pair = path.rpartition(".")[0]
        paired = f"{pair}.weight" in state
        if paired:
            members = model.get_submodule(pair).named_children()
            layers = [name for name, member in members if isinstance(member, nn.Conv2d | nn.Linear)]
            layer = f"{pair}.{layers[0]}" if layers else layer
            for entry in ("weight", "bias"):
                if f"{pair}.{entry}" in state:
                    state[f"{layer}.{entry}"] = state.pop(f"{pair}.{entry}")
        added = f"{layer}.bias" in state and f"{layer}.bias" not in own
        if not paired and not added and folded != norms:
            continue  # it is missing
        channels, eps = module.num_features, module.eps  # type: ignore[union-attr]
        identity = {
            "weight": torch.ones(channels),
            "bias": state.pop(f"{layer}.bias") if added else torch.zeros(channels),
            "running_mean": torch.zeros(channels),
            "running_var": torch.full((channels,), 1.0 - eps),  # plus eps it is 1, exactly in float32
            "num_batches_tracked": torch.zeros((), dtype=torch.int64),
        }
        state |= {f"{path}.{entry}": tensor for entry, tensor in identity.items() if f"{path}.{entry}" in own}
    return state


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, or the state dict itself, without the prefixes of wrapped modules.

    Raises:
        WeightsError: If there is none.
    """
    state: Any = checkpoint
    while isinstance(state, Mapping):
        inside = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping) and state[key]), None)
        if inside is None:
            break
        state = inside
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"No state dict: expected tensors by name, perhaps under {', '.join(WRAPPERS)}.")
    state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}  # torch's AveragedModel counts
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def convert_file(
    source: str | Path,
    target: str | Path,
    name: str,
    *,
    to: str = "zoo",
    metadata: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Path:
    """Convert a weight file, a pickle (``.pth``, ``.bin``) or safetensors of any known layout, into safetensors.

    A pickle is read with PyTorch's restricted reader: one that would run code is refused. The target is written
    whole or not at all; the hash of the source is kept in its header.

    Args:
        source: The file to read.
        target: The safetensors file to write; replaced if it exists.
        name: The model it belongs to, for example ``"efficientvit_m0"``, perhaps with the tag of these weights.
        to: Whose parameter names the target has: ``"zoo"`` or ``"authors"``.
        metadata: Strings to keep in the header besides, for example a licence.
        **overrides: As for :func:`convert_state_dict`.

    Returns:
        The target.

    Raises:
        UnknownModelError: If there is no such model.
        WeightsError: If the source is missing, damaged, unsafe or not this model's, or there is no such layout.
        OSError: If the target cannot be written.
    """
    source, target = Path(source), Path(target)
    checkpoint = _load_pickle(source) if is_pickle(source) else load_state_dict(source)
    # Cloned: tensors of a pickle may be views of one another, which safetensors does not store.
    tensors = {key: tensor.clone() for key, tensor in convert_state_dict(checkpoint, name, **overrides).items()}
    check_finite(tensors, source)
    if to == "authors":
        tensors = to_authors(tensors, name, **overrides)
    elif to != "zoo":
        raise WeightsError(f"to is {to!r}; expected 'zoo' or 'authors'.")
    model, tag = split_name(name)
    described = {"zoo_version": zoo.__version__, "model": model, "tag": tag, "source_sha256": sha256_of(source)}
    if config := {**tag_config(name), **overrides}:
        described["config"] = json.dumps(config)
    save_safetensors(tensors, target, {**described, **(metadata or {})})
    return target


def tag_config(name: str) -> Mapping[str, Any]:
    """The config fields that the weights of a ``model.tag`` need; none without a tag."""
    return get_weights(name).config if split_name(name)[1] else {}


def _load_pickle(path: Path) -> Mapping[str, Any]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.save stores; what is compressed may be far larger than the file.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise WeightsError("it is compressed, as torch.save never does")
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 -- restricted, see above
        _check_tensors(checkpoint)
        return checkpoint
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise WeightsError(f"{path}: not read, it is damaged or holds more than tensors ({reason(error)})") from error


def _check_tensors(value: Any) -> None:
    """Refuse tensors that are no plain arrays of the file's own numbers, such as one number seen a billion times."""
    if isinstance(value, Mapping):
        for entry in value.values():
            _check_tensors(entry)
    elif isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"a tensor of shape {list(value.shape)} has fewer numbers than that, or none")


class _Renamer:
    """One direction of a family's rules: entries of one layout to entries of the other."""

    def __init__(
        self,
        names: Iterable[tuple[str | list[str], str | list[str]]],
        inner: Iterable[tuple[str, str]],
        segments: Mapping[str, str],
    ) -> None:
        self.inner = _Renamer(inner, (), {}) if inner else None
        # A rule for each name on the left: pattern, indices, names on the right, which part of them, of how many.
        self.rules = [
            (_pattern(source), _INDEX.findall(source), _as_list(targets), part, len(_as_list(sources)))
            for sources, targets in names
            for part, source in enumerate(_as_list(sources))
        ]
        self.segments = segments
        self.foreign = set(segments.values()) - set(segments)  # parts that only the other layout has

    def __call__(self, name: str) -> tuple[list[str], int, int] | None:
        """The names in the other layout, which part of them this is, and of how many; None for an unknown name."""
        for pattern, indices, targets, part, parts in self.rules:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            numbers = {
                letter: int(number) - int(offset or 0)
                for (letter, offset), number in zip(indices, match.groups(), strict=False)  # the last may be the rest
            }
            if any(number < 0 for number in numbers.values()):
                continue
            rest = self._rest(match.groups()[-1]) if targets[0].endswith("*") else ""
            if rest is not None:
                filled = (
                    _INDEX.sub(lambda index: str(numbers[index[1]] + int(index[2] or 0)), target)  # noqa: B023
                    for target in targets
                )
                return [target.removesuffix("*") + rest for target in filled], part, parts
        return None

    def _rest(self, rest: str) -> str | None:
        inside = self.inner(rest) if self.inner else None
        if inside is not None:
            return inside[0][0]
        parts = rest.split(".")
        return ".".join(self.segments.get(part, part) for part in parts) if self.foreign.isdisjoint(parts) else None

    def apply(
        self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
        """Rename, split and concatenate the entries of a state dict.

        Args:
            state: Tensors by name.
            shapes: Of the entries wanted, as far as they are known; a split into unknown shapes is into equal parts.

        Returns:
            The tensors by their new names, their (first) old names by the new ones, and the names without a place.
        """
        pieces: dict[str, list[Tensor | None]] = {}
        origin: dict[str, str] = {}
        unknown: list[str] = []
        for key, tensor in state.items():
            place = self(key)
            if place is None:
                unknown.append(key)
                continue
            targets, part, parts = place
            split = _split(tensor, [shapes.get(target, ()) for target in targets])
            if split is None or any(pieces.get(target, [None] * parts)[part] is not None for target in targets):
                unknown.append(key)  # it cannot be split, or is there under two names
                continue
            for target, piece in zip(targets, split, strict=True):
                pieces.setdefault(target, [None] * parts)[part] = piece
                origin.setdefault(target, key)
        whole: dict[str, Tensor] = {}
        for target, slots in pieces.items():
            found = [piece for piece in slots if piece is not None]
            if len(found) < len(slots):
                unknown.append(origin[target])  # its other parts are missing
            else:
                whole[target] = found[0] if len(found) == 1 else torch.cat(found)
        return whole, origin, unknown


def _split(tensor: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...] | None:
    """A tensor in as many pieces as there are shapes, along the first dimension; None when they do not add up."""
    if len(shapes) == 1:
        return (tensor,)
    length = tensor.shape[0] if tensor.ndim else 0
    sizes = [shape[0] if shape else length // len(shapes) for shape in shapes]
    return tensor.split(sizes) if sum(sizes) == length else None


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with a group for each index and one for the rest."""
    literal = re.escape(_INDEX.sub("\0", template.removesuffix("*")))
    return re.compile(literal.replace("\0", r"(\d+)") + ("(.+)" if template.endswith("*") else ""))


@dataclass(frozen=True)
class _Converter:
    """One family's rules, ready to apply."""

    to_zoo: _Renamer
    to_authors: _Renamer
    computed: re.Pattern[str] | None
    trailing_ones: Mapping[str, int]  # by pattern
    permute: Mapping[str, list[int]]  # by pattern
    copies: tuple[tuple[str, str], ...] = ()  # prefixes of a shared tensor's further names, and of its first

    def without_copies(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries without the further names of shared tensors.

        Raises:
            WeightsError: If what should be one tensor is not.
        """
        if not self.copies:
            return dict(state)
        kept = {}
        for key, tensor in state.items():
            first = self._first_name(key)
            if first is None or first not in state:
                kept[key] = tensor
            elif not tensor.is_meta and not torch.equal(tensor, state[first]):
                raise WeightsError(
                    f"{key} differs from {first}, with which it is shared; was the sharing lost in training?"
                )
        return kept

    def with_copies(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries, shared tensors under all of their names."""
        copied = dict(state)
        for copy, first in self.copies:
            copied |= {copy + key.removeprefix(first): tensor for key, tensor in state.items() if key.startswith(first)}
        return copied

    def _first_name(self, key: str) -> str | None:
        found = next(((copy, first) for copy, first in self.copies if key.startswith(copy)), None)
        return None if found is None else found[1] + key.removeprefix(found[0])

    def is_zoo_layout(self, state: Iterable[str]) -> bool:
        """Whether these are zoo's parameter names; the first that only one of the two layouts has decides."""
        for key in state:
            ours, theirs = self.to_authors(key) is not None, self.to_zoo(key) is not None
            if ours != theirs:
                return ours
        return not self.copies

    def is_computed(self, key: str) -> bool:
        """Whether zoo computes this entry of the authors' files."""
        return self.computed is not None and self.computed.fullmatch(key) is not None

    def permuted(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the authors, its dimensions in zoo's order."""
        order = _matching(self.permute, key)
        return tensor if order is None or tensor.ndim != len(order) else tensor.permute(order)

    def reshaped(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of zoo under the authors' name for it, with their order of dimensions and their trailing ones."""
        order, ones = _matching(self.permute, key), _matching(self.trailing_ones, key)
        if order is not None:
            tensor = tensor.permute([order.index(i) for i in range(len(order))])
        return tensor if ones is None else tensor.reshape(*tensor.shape, *(1,) * ones)


def _matching(table: Mapping[str, Any], key: str) -> Any:
    """The entry of the first pattern that a name matches, None when none does."""
    return next((value for pattern, value in table.items() if fnmatchcase(key, pattern)), None)


@cache
def _converter(family: Family, config: ModelConfig) -> _Converter | None:
    """The rules of a family for one of its models, None when it has no other layout."""
    if family.layout is not None:
        return _by_layout(family.layout(config))
    path = family.converter or _RULES / f"{family.name}.toml"
    if not path.is_file():
        return None
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
        re.compile("|".join(map(translate, document["computed"]))) if "computed" in document else None,
        document.get("trailing_ones", {}),
        document.get("permute", {}),
    )


def _by_layout(pairs: list[tuple[str, str]]) -> _Converter:
    """The converter that pairs of names make; further names of one tensor are copies."""
    first: dict[str, str] = {}
    for theirs, ours in pairs:
        first.setdefault(ours, theirs)
    names = [(theirs, ours) for ours, theirs in first.items()]
    copies = tuple(
        (theirs.removesuffix("*"), first[ours].removesuffix("*")) for theirs, ours in pairs if first[ours] != theirs
    )
    reverse = [(ours, theirs) for theirs, ours in names]
    return _Converter(_Renamer(names, (), {}), _Renamer(reverse, (), {}), None, {}, {}, copies)


def _blueprint(name: str, overrides: Mapping[str, Any]) -> tuple[Family, Any]:
    """A model's family, and the model on the meta device."""
    config = get_config(name).override(**overrides)
    family = get_family(family_name(split_name(name)[0]))
    with torch.device("meta"):
        return family, family.model(config)


def _fit_trailing_ones(tensor: Tensor, own: Tensor) -> Tensor:
    """The tensor with as many trailing dimensions of size 1 as its counterpart in the model, if only that differs."""
    shorter, longer = sorted((tuple(tensor.shape), tuple(own.shape)), key=len)
    ones = (1,) * (len(longer) - len(shorter))
    return tensor.reshape(own.shape) if longer == shorter + ones else tensor
