"""EfficientFormer in numbers. The network is :mod:`zoo.models.efficientformer`."""

from dataclasses import dataclass
from typing import Any

from zoo.config import ImageConfig, axis, scale_part
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientFormerConfig(ImageConfig):
    """The paper's networks in numbers. Tuples hold one entry per stage, at strides 4, 8, 16 and 32; default L1."""

    widths: tuple[int, ...] = axis("width", (48, 96, 224, 448), multiple_of=16)
    depths: tuple[int, ...] = axis("depth", (3, 2, 6, 4))
    attention_depths: tuple[int, ...] = (0, 0, 0, 1)  # how many of a stage's blocks, its last ones, are 3D
    pool_size: int = 3  # window of the pooling that mixes positions in 4D blocks
    num_heads: int = 8
    key_dim: int = 32  # channels of q and of k in each head
    value_ratio: float = 4.0  # channels of v in each head, as a multiple of key_dim
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1e-5
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=32)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths", "attention_depths")
        self.check_positive("widths", "depths", "pool_size", "num_heads", "key_dim", "value_ratio", "mlp_ratio")
        if self.widths[0] % 2:
            raise ConfigError(f"widths[0] is {self.widths[0]}; the stem halves it: expected an even number.")
        if self.pool_size % 2 == 0:
            raise ConfigError(f"pool_size is {self.pool_size}; expected an odd number.")
        for i, (depth, attention) in enumerate(zip(self.depths, self.attention_depths, strict=True)):
            if not 0 <= attention <= depth:
                raise ConfigError(
                    f"attention_depths[{i}] is {attention}; the stage has {depth} blocks: expected 0 to {depth}."
                )

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """As large a part of a stage's blocks is 3D as before."""
        counts = zip(self.attention_depths, self.depths, changes.get("depths", self.depths), strict=True)
        return super().fit(changes) | {"attention_depths": tuple(scale_part(*each) for each in counts)}


FAMILY = Family(
    "efficientformer",
    config=EfficientFormerConfig,
    model="zoo.models.efficientformer:EfficientFormer",
    title="EfficientFormer",
    paper="arXiv:2206.01191",
    code="github.com/snap-research/EfficientFormer @ d01da42, models/efficientformer.py",
    licence="MIT AND Apache-2.0",
    first_conv="stem.conv1",
    classifier=("head", "head_dist"),
)


@FAMILY.variant
def efficientformer_l1() -> EfficientFormerConfig:
    """12.3 M parameters, 1.3 GMACs, 80.2 % top-1."""
    return EfficientFormerConfig()


@FAMILY.variant
def efficientformer_l3() -> EfficientFormerConfig:
    """31.4 M parameters, 3.9 GMACs, 82.4 % top-1."""
    return EfficientFormerConfig(widths=(64, 128, 320, 512), depths=(4, 4, 12, 6), attention_depths=(0, 0, 0, 4))


@FAMILY.variant
def efficientformer_l7() -> EfficientFormerConfig:
    """82.2 M parameters, 10.2 GMACs, 83.3 % top-1."""
    return EfficientFormerConfig(widths=(96, 192, 384, 768), depths=(6, 6, 18, 8), attention_depths=(0, 0, 0, 8))
