"""EfficientViT (MSRA) in numbers. The network is :mod:`zoo.models.efficientvit`."""

import math
from dataclasses import dataclass

from zoo.config import ImageConfig, axis
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientViTConfig(ImageConfig):
    """The paper's Table 1. Tuples hold one entry per stage, at strides 16, 32 and 64; the default is M0."""

    widths: tuple[int, ...] = axis("width", (64, 128, 192), multiple_of=8)
    depths: tuple[int, ...] = axis("depth", (1, 2, 3))
    num_heads: tuple[int, ...] = (4, 4, 4)
    window_sizes: tuple[int, ...] = (7, 7, 7)  # attention runs in windows of at most this side
    kernel_sizes: tuple[int, ...] = (5, 5, 5, 5)  # of the depthwise convolution on q: one entry per head
    key_dim: int = 16  # channels of q and of k in each head
    mlp_ratio: float = 2.0
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=16)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths", "num_heads", "window_sizes")
        self.check_positive("widths", "depths", "num_heads", "window_sizes", "kernel_sizes", "key_dim", "mlp_ratio")
        if self.widths[0] % 8:
            raise ConfigError(
                f"widths[0] is {self.widths[0]}; the stem halves it three times: expected a multiple of 8."
            )
        for i, (width, heads) in enumerate(zip(self.widths, self.num_heads, strict=True)):
            if width % heads:
                raise ConfigError(f"widths[{i}] is {width}, which num_heads[{i}]={heads} does not divide.")
            if heads > len(self.kernel_sizes):
                raise ConfigError(f"num_heads[{i}] is {heads}, but kernel_sizes has {len(self.kernel_sizes)} entries.")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes}; expected odd sizes.")

    def granularity(self, name: str, index: int) -> int:
        """Heads divide the width of their stage."""
        multiple = super().granularity(name, index)
        return math.lcm(multiple, self.num_heads[index]) if name == "widths" else multiple


FAMILY = Family(
    "efficientvit",
    config=EfficientViTConfig,
    model="zoo.models.efficientvit:EfficientViT",
    title="EfficientViT (MSRA)",
    paper="arXiv:2305.07027",
    code="github.com/microsoft/Cream @ 4a13c40, EfficientViT/classification",
    licence="MIT",
    first_conv="patch_embed.conv1.conv",
    classifier="head.linear",
)


@FAMILY.variant
def efficientvit_m0() -> EfficientViTConfig:
    """2.3 M parameters, 79 MMACs, 63.2 % top-1."""
    return EfficientViTConfig()


@FAMILY.variant
def efficientvit_m1() -> EfficientViTConfig:
    """3.0 M parameters, 167 MMACs, 68.4 % top-1."""
    return EfficientViTConfig(widths=(128, 144, 192), num_heads=(2, 3, 3), kernel_sizes=(7, 5, 3, 3))


@FAMILY.variant
def efficientvit_m2() -> EfficientViTConfig:
    """4.2 M parameters, 201 MMACs, 70.8 % top-1."""
    return EfficientViTConfig(widths=(128, 192, 224), num_heads=(4, 3, 2), kernel_sizes=(7, 5, 3, 3))


@FAMILY.variant
def efficientvit_m3() -> EfficientViTConfig:
    """6.9 M parameters, 263 MMACs, 73.4 % top-1."""
    return EfficientViTConfig(widths=(128, 240, 320), num_heads=(4, 3, 4))


@FAMILY.variant
def efficientvit_m4() -> EfficientViTConfig:
    """8.8 M parameters, 299 MMACs, 74.3 % top-1."""
    return EfficientViTConfig(widths=(128, 256, 384), kernel_sizes=(7, 5, 3, 3))


@FAMILY.variant
def efficientvit_m5() -> EfficientViTConfig:
    """12.4 M parameters, 522 MMACs, 77.1 % top-1."""
    return EfficientViTConfig(widths=(192, 288, 384), depths=(1, 3, 4), num_heads=(3, 3, 4), kernel_sizes=(7, 5, 3, 3))
