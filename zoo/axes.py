"""Multiplying a config's dimensions: what a factor does to each field, and how products are made whole numbers.

Which fields are which dimension, and what they must be multiples of, each family says once, with ``axis()``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from zoo.config import Axis, ModelConfig, make_divisible
from zoo.errors import ConfigError

Config = TypeVar("Config", bound=ModelConfig)


@dataclass(frozen=True)
class Factors:
    """Multipliers of a network's dimensions; 1 changes nothing.

    Raises:
        ConfigError: If one of them is not a positive, finite number.
    """

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0
    group: float | None = None  # of the channels in a group; None: as width
    vocabulary: float = 1.0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "resolution", "vocabulary"):
            check_factor(name, getattr(self, name))
        if self.group is not None:
            check_factor("group", self.group)

    def of(self, dimension: str) -> float:
        """The multiplier of one of the dimensions that ``axis()`` knows."""
        if dimension == "group" and self.group is None:
            return self.width
        return getattr(self, dimension)

    @property
    def cost(self) -> float:
        """d w^2 r^2: by how much they multiply the MACs of a network of ordinary convolutions, before rounding."""
        return self.depth * self.width**2 * self.resolution**2


def check_factor(name: str, value: Any) -> None:
    """Raise when a factor is not a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ConfigError(f"{name} is {value!r}; expected a positive number.")


def nearest_multiple(value: float, multiple: int) -> int:
    """The nearest multiple, at least one of it; a tie goes to the even one, as in pycls."""
    return max(multiple, round(value / multiple) * multiple)


def group_channels(value: float, multiple: int) -> int:
    """pycls' channels in a group: 1, 2, 4, or a multiple of 8."""
    channels = max(1, round(value))
    return channels if channels <= 2 else 4 if channels <= 5 else nearest_multiple(channels, math.lcm(8, multiple))


@dataclass(frozen=True)
class Rounding:
    """How a rule makes whole numbers of products. Width, resolution and group functions get the family's multiple too.

    Source of the defaults: github.com/facebookresearch/pycls, models/scaler.py.
    """

    depth: Callable[[float], int] = round
    width: Callable[[float, int], int] = nearest_multiple
    resolution: Callable[[float, int], int] = lambda pixels, multiple: nearest_multiple(pixels, math.lcm(4, multiple))
    group: Callable[[float, int], int] = group_channels
    fixed: tuple[str, ...] = ()  # fields that the rule does not scale
    not_narrower: tuple[str, ...] = ()  # fields that it only makes larger


PYCLS = Rounding()
EFFICIENTNET = Rounding(  # github.com/tensorflow/tpu, models/official/efficientnet: round_repeats, round_filters
    depth=lambda blocks: math.ceil(round(blocks, 6)),  # 1.1 * 10 is a little more than 11
    width=make_divisible,
    resolution=nearest_multiple,
)
TINYNET = Rounding(  # tinynet_pytorch: sides are cut, not rounded; the ends of the network keep their widths
    width=make_divisible,
    resolution=lambda pixels, multiple: max(multiple, int(pixels + 1e-6) // multiple * multiple),
    fixed=("stem_width",),
    not_narrower=("head_width",),
)


def resize(config: Config, factors: Factors, rounding: Rounding = PYCLS) -> Config:
    """A config with its dimensions multiplied.

    Args:
        config: Any family's. A field that a factor of 1 concerns is left as it is, rounded or not.
        factors: What to multiply by.
        rounding: How to make whole numbers of the products. Depths stay at least 1, or 0 where they were.

    Returns:
        A valid config of the same family: fields that depend on scaled ones are made to fit (``config.fit``).
    """
    changes: dict[str, Any] = {}
    for spec in fields(config):
        axis: Axis | None = spec.metadata.get("axis")
        factor = 1.0 if axis is None else factors.of(axis.dimension)
        if axis is None or factor == 1 or spec.name in rounding.fixed:
            continue
        value = getattr(config, spec.name)
        entries = value if isinstance(value, tuple) else (value,)
        scaled = []
        for i, entry in enumerate(entries):
            if axis.dimension == "depth":
                scaled.append(max(min(1, entry), rounding.depth(entry * factor)))
                continue
            round_to = getattr(rounding, "width" if axis.dimension == "vocabulary" else axis.dimension)
            multiple = config.granularity(spec.name, i)
            product = round_to(entry * factor, multiple)
            if axis.dimension == "resolution":
                product = max(product, -(-config.min_input_side // multiple) * multiple)  # type: ignore[attr-defined]
            scaled.append(max(entry, product) if spec.name in rounding.not_narrower else product)
        changes[spec.name] = tuple(scaled) if isinstance(value, tuple) else scaled[0]
    return config.override(**config.fit(changes))


def dimensions(config: ModelConfig) -> set[str]:
    """The dimensions that a family declares: some of ``"depth"``, ``"width"``, ``"resolution"``, ..."""
    return {spec.metadata["axis"].dimension for spec in fields(config) if "axis" in spec.metadata}
