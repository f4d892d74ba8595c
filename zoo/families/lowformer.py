"""LowFormer in numbers. The network is :mod:`zoo.models.lowformer`."""

from dataclasses import dataclass
from typing import Any

from zoo.config import ImageConfig, axis
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class LowFormerConfig(ImageConfig):
    """The paper's Table 1. Tuples hold one entry per stage, at strides 4, 8, 16 and 32; the default is B0."""

    stem_width: int = axis("width", 16, multiple_of=4)
    stem_depth: int = 0  # blocks after the stem's convolution
    widths: tuple[int, ...] = axis("width", (32, 64, 128, 256), multiple_of=8)
    depths: tuple[int, ...] = axis("depth", (1, 1, 3, 4))
    num_conv_stages: int = 2  # the first stages, whose first block downsamples; in the others, that comes before them
    expand_ratio: float = 4.0  # of the convolutions, but for those two kinds:
    stem_expand_ratio: float = 2.0
    downsample_expand_ratio: float = 4.0
    fused_below: int = 256  # the width from which the convolutions of the blocks with attention are depthwise
    attention: bool = True
    attention_reduction: int = 32  # pixels, a side, to a position of the map that attention is on
    attention_ratio: float = 0.5  # channels of q, of k and of v, as a multiple of the width
    min_head_dim: int = 30
    mlp: bool = True  # without it, attention has no norm before it either
    mlp_ratio: float = 4.0
    head_widths: tuple[int, int] = (1536, 1600)  # of the hidden layers before and after pooling
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=32)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths")
        self.check_positive("stem_width", "widths", "depths", "expand_ratio", "stem_expand_ratio", "mlp_ratio")
        self.check_positive("downsample_expand_ratio", "attention_reduction", "attention_ratio", "min_head_dim")
        self.check_positive("head_widths")
        if self.stem_depth < 0:
            raise ConfigError(f"stem_depth is {self.stem_depth}; expected 0 or more.")
        if not 0 <= self.num_conv_stages <= len(self.widths):
            raise ConfigError(
                f"num_conv_stages is {self.num_conv_stages}; expected 0 to {len(self.widths)}, the number of stages."
            )

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """A stage's convolutions stay fused or depthwise, as they were: their kind is no matter of scale."""
        widths = changes.get("widths", self.widths)
        depthwise = [new for old, new in zip(self.widths, widths, strict=True) if old >= self.fused_below]
        fused = [new for old, new in zip(self.widths, widths, strict=True) if old < self.fused_below]
        fused_below = min(depthwise) if depthwise else max(self.fused_below, 1 + max(fused))
        return super().fit(changes) | {"fused_below": fused_below}


FAMILY = Family(
    "lowformer",
    config=LowFormerConfig,
    model="zoo.models.lowformer:LowFormer",
    title="LowFormer",
    paper="arXiv:2409.03460",
    code="github.com/altair199797/LowFormer @ 661dd34",
    licence="Apache-2.0",
    first_conv="stem.0.conv",
    classifier="classifier",
)


@FAMILY.variant
def lowformer_b0() -> LowFormerConfig:
    """14.1 M parameters, 0.94 GMACs, 78.4 % top-1."""
    return LowFormerConfig()


@FAMILY.variant
def lowformer_b1() -> LowFormerConfig:
    """17.9 M parameters, 1.4 GMACs, 79.9 % top-1."""
    return LowFormerConfig(depths=(1, 1, 5, 5), downsample_expand_ratio=6.0)


@FAMILY.variant
def lowformer_b15() -> LowFormerConfig:
    """34 M parameters, 2.6 GMACs, 81.2 % top-1. The authors write B1.5."""
    return LowFormerConfig(
        stem_width=20,
        widths=(40, 80, 160, 320),
        depths=(1, 1, 6, 6),
        downsample_expand_ratio=6.0,
        head_widths=(2304, 2560),
    )


@FAMILY.variant
def lowformer_b2() -> LowFormerConfig:
    """45 M parameters, 3.7 GMACs. No weights are published."""
    return lowformer_b15().override(stem_width=24, widths=(48, 96, 192, 384))


@FAMILY.variant
def lowformer_b3() -> LowFormerConfig:
    """57 M parameters, 6.1 GMACs, 83.6 % top-1."""
    return LowFormerConfig(
        stem_width=32,
        stem_depth=1,
        widths=(64, 128, 256, 512),
        depths=(2, 3, 6, 6),
        stem_expand_ratio=4.0,
        downsample_expand_ratio=6.0,
    )


@FAMILY.variant
def lowformer_e1() -> LowFormerConfig:
    """B1.5 for edge GPUs: shallower, and convolutions alone. 18.9 M parameters, 1.35 GMACs, 78.8 % top-1."""
    return lowformer_b15().override(depths=(1, 1, 4, 4), attention=False, mlp=False)


@FAMILY.variant
def lowformer_e2() -> LowFormerConfig:
    """B3 for edge GPUs: shallower, and convolutions alone. 22.8 M parameters, 3.8 GMACs, 81.6 % top-1."""
    return lowformer_b3().override(depths=(2, 3, 4, 4), attention=False, mlp=False)


@FAMILY.variant
def lowformer_e3() -> LowFormerConfig:
    """B3 for edge GPUs: without MLPs. 41.3 M parameters, 5.4 GMACs, 83.0 % top-1."""
    return lowformer_b3().override(mlp=False)
