"""EfficientMod in numbers. The network is :mod:`zoo.models.efficientmod`."""

from dataclasses import dataclass

from zoo.config import ImageConfig, axis
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientModConfig(ImageConfig):
    """The paper's Table 8. Tuples hold one entry per stage, at strides 4, 8, 16 and 32; the default is XXS."""

    widths: tuple[int, ...] = axis("width", (32, 64, 128, 256), multiple_of=8)
    depths: tuple[int, ...] = axis("depth", (2, 2, 6, 2))  # modulation blocks
    attention_depths: tuple[int, ...] = axis("depth", (0, 0, 1, 2))  # attention blocks, which follow them
    expand_ratios: tuple[int, ...] = (1, 6)  # of the values: the modulation blocks of a stage take them in turn
    kernel_size: int = 7  # of the context
    num_heads: int = 8
    min_head_dim: int = 32  # where it is more than the width has, attention is wider than its input
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)  # of the attention blocks
    layer_scale_init: float = 1e-4  # of the modulation blocks
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=32)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths", "attention_depths", "mlp_ratios")
        self.check_positive("widths", "depths", "expand_ratios", "kernel_size", "num_heads", "min_head_dim")
        self.check_positive("mlp_ratios", "layer_scale_init")
        if min(self.attention_depths, default=0) < 0:
            raise ConfigError(f"attention_depths is {self.attention_depths}; expected 0 or more in each stage.")
        if not self.expand_ratios:
            raise ConfigError("expand_ratios is empty; expected at least one ratio.")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size is {self.kernel_size}; expected an odd one.")


FAMILY = Family(
    "efficientmod",
    config=EfficientModConfig,
    model="zoo.models.efficientmod:EfficientMod",
    title="EfficientMod",
    paper="arXiv:2403.19963",
    code="github.com/ma-xu/EfficientMod @ ec04df6",
    licence="Apache-2.0",
    first_conv="stem.conv",
    classifier="head",
)


@FAMILY.variant
def efficientmod_xxs() -> EfficientModConfig:
    """4.7 M parameters, 0.6 GMACs, 76.0 % top-1."""
    return EfficientModConfig()


@FAMILY.variant
def efficientmod_xs() -> EfficientModConfig:
    """6.6 M parameters, 0.8 GMACs, 78.3 % top-1."""
    return EfficientModConfig(
        widths=(32, 64, 144, 288), depths=(3, 3, 4, 2), attention_depths=(0, 0, 3, 3), expand_ratios=(1, 4)
    )


@FAMILY.variant
def efficientmod_s() -> EfficientModConfig:
    """12.9 M parameters, 1.4 GMACs, 81.0 % top-1."""
    return EfficientModConfig(
        widths=(32, 64, 144, 312),
        depths=(4, 4, 8, 4),
        attention_depths=(0, 0, 4, 4),
        mlp_ratios=(4.0, 4.0, 4.0, 5.0),
    )


@FAMILY.variant
def efficientmod_s_conv() -> EfficientModConfig:
    """Modulation alone. 12.9 M parameters, 1.5 GMACs, 80.5 % top-1."""
    return EfficientModConfig(widths=(40, 80, 160, 344), depths=(4, 4, 12, 8), attention_depths=(0, 0, 0, 0))
