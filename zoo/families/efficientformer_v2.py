"""EfficientFormerV2 in numbers. The network is :mod:`zoo.models.efficientformer_v2`."""

from dataclasses import dataclass
from typing import Any

from zoo.config import ImageConfig, axis, scale_part
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientFormerV2Config(ImageConfig):
    """The paper's networks in numbers. Tuples hold one entry per stage, at strides 4, 8, 16 and 32; default S0."""

    widths: tuple[int, ...] = axis("width", (32, 48, 96, 176), multiple_of=8)
    depths: tuple[int, ...] = axis("depth", (2, 2, 6, 4))
    mlp_ratios: tuple[tuple[float, ...], ...] = ((4, 4), (4, 4), (4, 3, 3, 3, 4, 4), (4, 3, 3, 4))  # per block
    attention_depths: tuple[int, ...] = (0, 0, 2, 2)  # how many of a stage's blocks, its last ones, have attention
    attention_strides: tuple[int, ...] = (1, 1, 2, 1)  # attention runs on a map this many times smaller
    attention_downsample: tuple[bool, ...] = (False, False, False, True)  # whether attention helps to enter the stage
    num_heads: int = 8
    key_dim: int = 32  # channels of q and of k in each head
    downsample_key_dim: int = 16  # the same where attention downsamples
    value_ratio: float = 4.0  # channels of v in each head, as a multiple of those of k
    layer_scale_init: float = 1e-5
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=32)

    def validate(self) -> None:
        super().validate()
        per_stage = ("widths", "depths", "mlp_ratios", "attention_depths", "attention_strides", "attention_downsample")
        self.check_same_length(*per_stage)
        self.check_positive("widths", "depths", "attention_strides")
        self.check_positive("num_heads", "key_dim", "downsample_key_dim", "value_ratio")
        if self.widths[0] % 2:
            raise ConfigError(f"widths[0] is {self.widths[0]}; the stem halves it: expected an even number.")
        if self.attention_downsample[0]:
            raise ConfigError("attention_downsample[0] is True; the first stage follows the stem: expected False.")
        for i, (depth, ratios) in enumerate(zip(self.depths, self.mlp_ratios, strict=True)):
            if len(ratios) != depth or min(ratios) <= 0:
                raise ConfigError(f"mlp_ratios[{i}] is {ratios}; expected {depth} positive numbers, one per block.")
            if not 0 <= self.attention_depths[i] <= depth:
                raise ConfigError(f"attention_depths[{i}] is {self.attention_depths[i]}; expected 0 to {depth}.")

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """As large a part of a stage's blocks has attention as before; each takes the ratio of one in its place."""
        depths = changes.get("depths", self.depths)
        counts = zip(self.attention_depths, self.depths, depths, strict=True)
        ratios = zip(self.mlp_ratios, depths, strict=True)
        return super().fit(changes) | {
            "attention_depths": tuple(scale_part(*each) for each in counts),
            "mlp_ratios": tuple(tuple(old[i * len(old) // depth] for i in range(depth)) for old, depth in ratios),
        }


FAMILY = Family(
    "efficientformer_v2",
    config=EfficientFormerV2Config,
    model="zoo.models.efficientformer_v2:EfficientFormerV2",
    title="EfficientFormerV2",
    paper="arXiv:2212.08059",
    code="github.com/snap-research/EfficientFormer @ d01da42, models/efficientformer_v2.py",
    licence="MIT AND Apache-2.0",
    first_conv="stem.conv1.conv",
    classifier=("head", "head_dist"),
)


@FAMILY.variant
def efficientformerv2_s0() -> EfficientFormerV2Config:
    """3.6 M parameters, 0.40 GMACs, 76.2 % top-1."""
    return EfficientFormerV2Config()


@FAMILY.variant
def efficientformerv2_s1() -> EfficientFormerV2Config:
    """6.2 M parameters, 0.65 GMACs, 79.7 % top-1."""
    return EfficientFormerV2Config(
        widths=(32, 48, 120, 224),
        depths=(3, 3, 9, 6),
        mlp_ratios=((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
    )


@FAMILY.variant
def efficientformerv2_s2() -> EfficientFormerV2Config:
    """12.7 M parameters, 1.25 GMACs, 82.0 % top-1."""
    return EfficientFormerV2Config(
        widths=(32, 64, 144, 288),
        depths=(4, 4, 12, 8),
        mlp_ratios=((4,) * 4, (4,) * 4, (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4)),
        attention_depths=(0, 0, 4, 4),
        drop_path_rate=0.02,
    )


@FAMILY.variant
def efficientformerv2_l() -> EfficientFormerV2Config:
    """26.3 M parameters, 2.56 GMACs, 83.5 % top-1."""
    return EfficientFormerV2Config(
        widths=(40, 80, 192, 384),
        depths=(5, 5, 15, 10),
        mlp_ratios=(
            (4,) * 5,
            (4,) * 5,
            (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
            (4, 4, 4, 3, 3, 3, 3, 4, 4, 4),
        ),
        attention_depths=(0, 0, 6, 6),
        drop_path_rate=0.1,
    )
