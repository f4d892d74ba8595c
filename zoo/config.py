"""Model configs: frozen dataclasses that hold the numbers of a paper's table, nothing callable. Imports no torch."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from zoo.errors import ConfigError, nearest


@dataclass(frozen=True)
class Axis:
    """What scaling needs to know of a config field: which dimension it is, and what its values must be multiples of."""

    dimension: str  # "depth", "width", "resolution", "group" (channels in a group) or "vocabulary"
    multiple_of: int = 1


def axis(dimension: str, default: Any, *, multiple_of: int = 1) -> Any:
    """A dataclass field that scaling rules may change.

    Args:
        dimension: ``"depth"``, ``"width"``, ``"resolution"``, ``"group"`` (channels in a group) or ``"vocabulary"``.
        default: The field's default value.
        multiple_of: What a scaled value is rounded to a multiple of.
    """
    return field(default=default, metadata={"axis": Axis(dimension, multiple_of)})


def make_divisible(value: float, divisor: int = 8, *, round_limit: float = 0.9) -> int:
    """Round to the nearest multiple of ``divisor``, never below ``round_limit`` of the value (MobileNet's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * value else rounded


def scale_part(part: int, whole: int, new_whole: int) -> int:
    """How many of ``new_whole`` blocks are of a kind of which there were ``part`` in ``whole``: none stays none."""
    return min(new_whole, max(min(1, part), round(part * new_whole / whole)))


def last_of_each_size(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The stages after which the map gets smaller, and the last one, from the stride of each stage."""
    return tuple(i for i, following in enumerate((*strides[1:], 2)) if following > 1)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _conforms(value: Any, annotation: Any) -> bool:
    """Whether ``value`` fits a config field's annotation: int, float, bool, str, None, tuples and unions of these."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_conforms(value, option) for option in typing.get_args(annotation))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        options = typing.get_args(annotation)
        if len(options) == 2 and options[1] is Ellipsis:
            return all(_conforms(item, options[0]) for item in value)
        return len(value) == len(options) and all(map(_conforms, value, options))
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


@functools.cache
def type_hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields by name, worked out once."""
    return typing.get_type_hints(kind)


def _show(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of every family's config. Immutable, hashable, and equal after a trip through JSON.

    Lists become tuples on construction. Subclasses check their numbers in :meth:`validate`.

    Raises:
        ConfigError: If a value has the wrong type or the values do not fit together.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)  # a frozen dataclass hashes by value, its class as any class does
        hints = type_hints(kind)
        for spec in fields(self):
            value = _freeze(getattr(self, spec.name))
            if not _conforms(value, hints[spec.name]):
                raise ConfigError(
                    f"{type(self).__name__}.{spec.name} is {value!r}; expected {_show(hints[spec.name])}."
                )
            # 1 and 1.0 are equal but print differently: a float field always holds a float, so that JSON round-trips.
            if hints[spec.name] is float:
                value = float(value)
            object.__setattr__(self, spec.name, value)
        self.validate()

    def validate(self) -> None:
        """Raise :class:`ConfigError` when the numbers do not make a network. Subclasses extend this."""

    def check_same_length(self, *names: str) -> None:
        """Raise when these per-stage tuples differ in length."""
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            described = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ConfigError(f"{type(self).__name__}: {described}; expected one entry per stage in each.")

    def check_positive(self, *names: str) -> None:
        """Raise when one of these numbers, or an entry of one of these tuples, is not positive."""
        for name in names:
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry <= 0:
                    raise ConfigError(f"{type(self).__name__}.{name} is {value}; expected positive numbers.")

    def override(self, **changes: Any) -> Self:
        """A copy with some fields replaced.

        Raises:
            ConfigError: For a name that is not a field (with the nearest ones) or a value that does not fit.
        """
        names = [spec.name for spec in fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"{type(self).__name__} has no field {name!r}.{nearest(name, names)}")
        return dataclasses.replace(self, **changes)

    def granularity(self, name: str, index: int) -> int:
        """What entry ``index`` of a field with an axis must be a multiple of; families where more divides it say so."""
        return next(spec.metadata["axis"].multiple_of for spec in fields(self) if spec.name == name)

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Scaled fields, and with them the new values of fields that depend on them; families that have such extend it.

        ``self`` is the config before scaling; ``changes`` holds the fields that a rule has scaled and rounded.
        """
        return changes

    def scaling_origin(self) -> Self:
        """The network that a rule of this family's own scales, where it is another; else the config itself."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values by field name, tuples as tuples."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}

    def to_json(self) -> str:
        """JSON with the family's name under ``"family"``; :func:`zoo.config_from_json` reads it back."""
        from zoo.registry import family_of

        return json.dumps({"family": family_of(self).name, **self.to_dict()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; lists are taken for tuples."""
        names = [spec.name for spec in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field {name!r}.{nearest(name, names)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(ModelConfig):
    """The fields that every image model has."""

    img_size: int | tuple[int, int] = axis("resolution", 224)  # pixels: a side, or (height, width)
    in_chans: int = 3
    num_classes: int = 1000  # 0: no classifier, the model returns pooled features
    global_pool: str = "avg"  # "avg", "max", or "" for none (needs num_classes=0)
    drop_rate: float = 0.0  # dropout before the classifier
    drop_path_rate: float = 0.0  # stochastic depth of the last block; earlier blocks get linearly less

    @property
    def input_hw(self) -> tuple[int, int]:
        """Nominal input (height, width) in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    def map_hw(self, reduction: int) -> tuple[int, int]:
        """Height and width of the map that this many pixels a side make one position of; convolutions round up."""
        height, width = self.input_hw
        return -(-height // reduction), -(-width // reduction)

    @property
    def min_input_side(self) -> int:
        """The smallest side in pixels that the network can stride down; families with a deeper stem raise it."""
        return 32

    @property
    def taps(self) -> tuple[int, ...] | None:
        """The stages whose outputs are the feature levels, in order: all, where a family does not say otherwise.

        None where there are no ``widths`` with one entry per stage, so that only the network knows how many it has.
        """
        widths = getattr(self, "widths", None)
        return None if widths is None else tuple(range(len(widths)))

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        if self.in_chans < 1:
            raise ConfigError(f"{name}.in_chans is {self.in_chans}; expected at least 1 (3 for RGB).")
        if self.num_classes < 0:
            raise ConfigError(f"{name}.num_classes is {self.num_classes}; expected 0 (no classifier) or more.")
        if min(self.input_hw) < self.min_input_side:
            raise ConfigError(
                f"{name}.img_size is {self.img_size}; expected at least {self.min_input_side} pixels on each side."
            )
        if self.global_pool not in ("avg", "max", ""):
            raise ConfigError(f"{name}.global_pool is {self.global_pool!r}; expected 'avg', 'max' or ''.")
        if not self.global_pool and self.num_classes:
            raise ConfigError(f"{name}.global_pool is ''; a classifier needs pooled features, or num_classes=0.")
        for rate in ("drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, rate) < 1.0:
                raise ConfigError(f"{name}.{rate} is {getattr(self, rate)}; expected 0 <= rate < 1.")


@dataclass(frozen=True, kw_only=True)
class TextConfig(ModelConfig):
    """The fields that every language model has, by transformers' names."""

    vocab_size: int = axis("vocabulary", 32_000, multiple_of=64)
    hidden_size: int = axis("width", 1024, multiple_of=64)
    num_hidden_layers: int = axis("depth", 24)  # blocks that a token passes on its way, shared weights or not
    max_position_embeddings: int = 2048  # tokens; the length that the model was trained at
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # standard deviation of fresh weights
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None

    def validate(self) -> None:
        super().validate()
        self.check_positive("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{type(self).__name__}.{name} is {token}; expected 0 to {self.vocab_size - 1} or None."
                )

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """No vocabulary is too small for its special tokens."""
        if "vocab_size" in changes:
            special = (self.bos_token_id, self.eos_token_id, self.pad_token_id)
            least = 1 + max((token for token in special if token is not None), default=0)
            changes = changes | {"vocab_size": max(changes["vocab_size"], least)}
        return super().fit(changes)
