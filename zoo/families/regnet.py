"""RegNetY in numbers. The network is :mod:`zoo.models.regnet`."""

from dataclasses import dataclass
from typing import Any

from zoo.config import ImageConfig, axis
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class RegNetConfig(ImageConfig):
    """Tuples hold one entry per stage, at strides 4, 8, 16 and 32; the default is 400MF."""

    depths: tuple[int, ...] = axis("depth", (1, 3, 6, 6))
    widths: tuple[int, ...] = axis("width", (48, 104, 208, 440), multiple_of=8)
    group_sizes: tuple[int, ...] = axis("group", (8, 8, 8, 8))  # channels in a group of the 3x3 convolutions
    stem_width: int = 32  # which no rule scales
    se_ratio: float = 0.25  # squeezed width, as a part of the block's input

    def validate(self) -> None:
        super().validate()
        self.check_same_length("depths", "widths", "group_sizes")
        self.check_positive("depths", "widths", "group_sizes", "stem_width", "se_ratio")
        if len(self.depths) != 4:
            raise ConfigError(f"depths has {len(self.depths)} entries; expected 4, one per stage.")
        for i, (width, group) in enumerate(zip(self.widths, self.group_sizes, strict=True)):
            if width % group:
                below = max(group, width // group * group)
                raise ConfigError(
                    f"widths[{i}] is {width}, which group_sizes[{i}]={group} does not divide; "
                    f"the nearest are {below} and {below + group}."
                )

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """pycls' adjustment: no group is wider than its stage, and widths are the nearest multiples of their groups."""
        widths = changes.get("widths", self.widths)
        groups = tuple(map(min, changes.get("group_sizes", self.group_sizes), widths))
        widths = tuple(max(g, round(w / g) * g) for w, g in zip(widths, groups, strict=True))
        return super().fit(changes) | {"widths": widths, "group_sizes": groups}


FAMILY = Family(
    "regnet",
    config=RegNetConfig,
    model="zoo.models.regnet:RegNet",
    title="RegNetY",
    paper="arXiv:2003.13678",
    code="github.com/facebookresearch/pycls @ 46a2452, models/regnet.py",
    licence="MIT",
    first_conv="stem.conv",
    classifier="head.fc",
)


def _regnet(depths: tuple[int, ...], widths: tuple[int, ...], group_size: int) -> RegNetConfig:
    return RegNetConfig(depths=depths, widths=widths, group_sizes=(group_size,) * len(widths))


@FAMILY.variant
def regnety_002() -> RegNetConfig:
    """200MF: 3.2 M parameters, 0.2 GMACs."""
    return _regnet((1, 1, 4, 7), (24, 56, 152, 368), 8)


@FAMILY.variant
def regnety_004() -> RegNetConfig:
    """400MF: 4.3 M parameters, 0.4 GMACs."""
    return _regnet((1, 3, 6, 6), (48, 104, 208, 440), 8)


@FAMILY.variant
def regnety_008() -> RegNetConfig:
    """800MF: 6.3 M parameters, 0.8 GMACs."""
    return _regnet((1, 3, 8, 2), (64, 128, 320, 768), 16)


@FAMILY.variant
def regnety_040() -> RegNetConfig:
    """4.0GF: 20.6 M parameters, 4.0 GMACs."""
    return _regnet((2, 6, 12, 2), (128, 192, 512, 1088), 64)
