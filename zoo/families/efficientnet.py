"""EfficientNet in numbers. The network is :mod:`zoo.models.efficientnet`."""

import math
from dataclasses import dataclass

from zoo.axes import EFFICIENTNET, Factors, resize
from zoo.config import ImageConfig, axis, last_of_each_size
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig(ImageConfig):
    """The paper's Table 1. Tuples hold one entry per stage, after a stem of stride 2; the default is B0."""

    stem_width: int = axis("width", 32, multiple_of=8)
    widths: tuple[int, ...] = axis("width", (16, 24, 40, 80, 112, 192, 320), multiple_of=8)
    head_width: int = axis("width", 1280, multiple_of=8)  # of the 1x1 convolution before the pooling
    depths: tuple[int, ...] = axis("depth", (1, 2, 2, 3, 3, 4, 1))
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)  # of a stage's first block
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    expand_ratios: tuple[float, ...] = (1, 6, 6, 6, 6, 6, 6)  # 1: depthwise separable blocks, which do not expand
    se_ratio: float = 0.25  # squeezed width, as a part of the block's input

    @property
    def min_input_side(self) -> int:
        return 2 * math.prod(self.strides)

    @property
    def taps(self) -> tuple[int, ...]:
        return last_of_each_size(self.strides)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths", "strides", "kernel_sizes", "expand_ratios")
        self.check_positive("stem_width", "widths", "head_width", "depths", "kernel_sizes", "se_ratio")
        if any(stride not in (1, 2) for stride in self.strides):
            raise ConfigError(f"strides is {self.strides}; expected 1 or 2 for each stage.")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes}; expected odd sizes.")
        if any(ratio < 1 for ratio in self.expand_ratios):
            raise ConfigError(f"expand_ratios is {self.expand_ratios}; expected 1 (no expansion) or more.")


FAMILY = Family(
    "efficientnet",
    config=EfficientNetConfig,
    model="zoo.models.efficientnet:EfficientNet",
    title="EfficientNet",
    paper="arXiv:1905.11946",
    code="github.com/tensorflow/tpu, models/official/efficientnet",
    licence="Apache-2.0",
    first_conv="conv_stem",
    classifier="classifier",
)


def compound(*, width: float, depth: float, img_size: int) -> EfficientNetConfig:
    """B0 scaled as the original code scales it: every width to the nearest multiple of 8, every depth rounded up."""
    base = EfficientNetConfig()
    return resize(base, Factors(depth, width), EFFICIENTNET).override(img_size=img_size)


@FAMILY.variant
def efficientnet_b0() -> EfficientNetConfig:
    """5.3 M parameters, 0.39 GMACs, 77.1 % top-1."""
    return EfficientNetConfig()


@FAMILY.variant
def efficientnet_b1() -> EfficientNetConfig:
    """7.8 M parameters, 0.70 GMACs, 79.1 % top-1."""
    return compound(width=1.0, depth=1.1, img_size=240)


@FAMILY.variant
def efficientnet_b2() -> EfficientNetConfig:
    """9.2 M parameters, 1.0 GMACs, 80.1 % top-1."""
    return compound(width=1.1, depth=1.2, img_size=260)


@FAMILY.variant
def efficientnet_b3() -> EfficientNetConfig:
    """12 M parameters, 1.8 GMACs, 81.6 % top-1."""
    return compound(width=1.2, depth=1.4, img_size=300)


@FAMILY.variant
def efficientnet_b4() -> EfficientNetConfig:
    """19 M parameters, 4.2 GMACs, 82.9 % top-1."""
    return compound(width=1.4, depth=1.8, img_size=380)


@FAMILY.variant
def efficientnet_b5() -> EfficientNetConfig:
    """30 M parameters, 9.9 GMACs, 83.6 % top-1."""
    return compound(width=1.6, depth=2.2, img_size=456)


@FAMILY.variant
def efficientnet_b6() -> EfficientNetConfig:
    """43 M parameters, 19 GMACs, 84.0 % top-1."""
    return compound(width=1.8, depth=2.6, img_size=528)


@FAMILY.variant
def efficientnet_b7() -> EfficientNetConfig:
    """66 M parameters, 37 GMACs, 84.3 % top-1."""
    return compound(width=2.0, depth=3.1, img_size=600)
