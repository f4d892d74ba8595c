"""AnyNet in numbers. The network is :mod:`zoo.models.anynet`."""

import math
from dataclasses import dataclass
from typing import Any

from zoo.config import ImageConfig, axis, last_of_each_size
from zoo.errors import ConfigError, nearest
from zoo.registry import Family

BLOCKS = (
    "mbconv",  # EfficientNet's inverted residual; depthwise separable where nothing is expanded
    "fused_mbconv",  # LowFormer's, with one widening 3x3 convolution
    "bottleneck",  # RegNetY's
    "modulation",  # EfficientMod's
    "pool",  # EfficientFormer's block on maps
    "scan",  # EfficientVMamba's
)


@dataclass(frozen=True, kw_only=True)
class AnyNetConfig(ImageConfig):
    """Tuples hold one entry per stage, after a stem of stride 2. Of the numbers, each block uses those it has."""

    blocks: tuple[str, ...] = ("fused_mbconv", "fused_mbconv", "mbconv", "mbconv")  # of ``BLOCKS``
    depths: tuple[int, ...] = axis("depth", (1, 2, 4, 2))
    widths: tuple[int, ...] = axis("width", (24, 48, 96, 176), multiple_of=8)
    strides: tuple[int, ...] = (2, 2, 2, 2)  # of a stage's first block
    kernel_sizes: tuple[int, ...] = (3, 3, 3, 3)
    expand_ratios: tuple[float, ...] = (4, 4, 4, 4)  # hidden width, as a multiple of the width
    group_sizes: tuple[int, ...] = axis("group", (8, 8, 8, 8))  # channels in a group, of "bottleneck"
    stem_width: int = axis("width", 16, multiple_of=8)
    head_width: int = axis("width", 0, multiple_of=8)  # of a 1x1 convolution before the pooling; 0: there is none
    se_ratio: float = 0.25  # squeezed width, as a part of the block's input, of "mbconv" and "bottleneck"
    state_size: int = 16  # of each channel, of "scan"
    layer_scale_init: float = 1e-4  # of "modulation" and "pool"

    @property
    def min_input_side(self) -> int:
        return max(32, 2 * math.prod(self.strides))

    @property
    def taps(self) -> tuple[int, ...]:
        return last_of_each_size(self.strides)

    def validate(self) -> None:
        super().validate()
        per_stage = ("blocks", "depths", "widths", "strides", "kernel_sizes", "expand_ratios", "group_sizes")
        self.check_same_length(*per_stage)
        self.check_positive("depths", "widths", "kernel_sizes", "group_sizes", "stem_width", "se_ratio", "state_size")
        self.check_positive("layer_scale_init")
        if not self.blocks:
            raise ConfigError("blocks is empty; expected one block for each stage.")
        if self.head_width < 0:
            raise ConfigError(f"head_width is {self.head_width}; expected 0 (none) or more.")
        for i, block in enumerate(self.blocks):
            if block not in BLOCKS:
                raise ConfigError(
                    f"blocks[{i}] is {block!r}; expected one of {', '.join(BLOCKS)}.{nearest(block, BLOCKS)}"
                )
            if block == "bottleneck" and self.widths[i] % self.group_sizes[i]:
                raise ConfigError(f"widths[{i}] is {self.widths[i]}; expected a multiple of group_sizes[{i}].")
            if block == "modulation" and self.expand_ratios[i] % 1:
                raise ConfigError(f"expand_ratios[{i}] is {self.expand_ratios[i]}; 'modulation' needs a whole number.")
        if any(stride not in (1, 2) for stride in self.strides):
            raise ConfigError(f"strides is {self.strides}; expected 1 or 2 for each stage.")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes}; expected odd sizes.")
        if any(ratio < 1 for ratio in self.expand_ratios):
            raise ConfigError(f"expand_ratios is {self.expand_ratios}; expected 1 or more.")

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Of bottlenecks, no group is wider than its stage, and widths are multiples of their groups, as in pycls."""
        widths = changes.get("widths", self.widths)
        groups = tuple(map(min, changes.get("group_sizes", self.group_sizes), widths))
        fitted = tuple(
            max(g, round(w / g) * g) if block == "bottleneck" else w
            for w, g, block in zip(widths, groups, self.blocks, strict=True)
        )
        head = {"head_width": 0} if not self.head_width else {}
        return super().fit(changes) | {"widths": fitted, "group_sizes": groups} | head


FAMILY = Family(
    "anynet",
    config=AnyNetConfig,
    model="zoo.models.anynet:AnyNet",
    title="AnyNet",
    paper="arXiv:2003.13678",
    code="github.com/facebookresearch/pycls @ 46a2452, models/anynet.py",
    licence="MIT",
    first_conv="stem.conv",
    classifier="head",
)


@FAMILY.variant
def anynet() -> AnyNetConfig:
    """A small network to start from: every other one is this with fields replaced."""
    return AnyNetConfig()
