"""EfficientVMamba in numbers. The network is :mod:`zoo.models.efficientvmamba`."""

from dataclasses import dataclass

from zoo.config import ImageConfig, axis
from zoo.errors import ConfigError
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class EfficientVMambaConfig(ImageConfig):
    """The paper's Table 1. Tuples hold one entry per stage, at strides 4, 8, 16 and 32; the default is T."""

    widths: tuple[int, ...] = axis("width", (48, 96, 192, 384), multiple_of=8)
    depths: tuple[int, ...] = axis("depth", (2, 2, 4, 2))
    num_scan_stages: int = 2  # the first stages have state-space blocks, the others inverted residuals (Table 8)
    state_size: int = 16  # of each channel of a scan
    scan_ratio: float = 2.0  # channels that are scanned, as a multiple of the width
    mlp_ratio: float = 4.0  # expansion of the inverted residuals
    img_size: int | tuple[int, int] = axis("resolution", 224, multiple_of=32)

    def validate(self) -> None:
        super().validate()
        self.check_same_length("widths", "depths")
        self.check_positive("widths", "depths", "state_size", "scan_ratio", "mlp_ratio")
        if not 0 <= self.num_scan_stages <= len(self.widths):
            raise ConfigError(
                f"num_scan_stages is {self.num_scan_stages}; expected 0 to {len(self.widths)}, the number of stages."
            )
        for i, width in enumerate(self.widths[: self.num_scan_stages]):
            if width < 8:
                raise ConfigError(f"widths[{i}] is {width}; the gate has an eighth of that: expected at least 8.")


FAMILY = Family(
    "efficientvmamba",
    config=EfficientVMambaConfig,
    model="zoo.models.efficientvmamba:EfficientVMamba",
    title="EfficientVMamba",
    paper="arXiv:2403.09977",
    code="github.com/TerryPei/EfficientVMamba @ 0bc5ee2, classification",
    licence="Apache-2.0",
    first_conv="stem.conv",
    classifier="head",
)


@FAMILY.variant
def efficientvmamba_t() -> EfficientVMambaConfig:
    """6.5 M parameters, 0.8 GMACs, 76.5 % top-1."""
    return EfficientVMambaConfig()


@FAMILY.variant
def efficientvmamba_s() -> EfficientVMambaConfig:
    """11 M parameters, 1.3 GMACs, 78.7 % top-1."""
    return EfficientVMambaConfig(widths=(64, 128, 256, 512))


@FAMILY.variant
def efficientvmamba_b() -> EfficientVMambaConfig:
    """34 M parameters, 4.0 GMACs, 81.8 % top-1."""
    return EfficientVMambaConfig(widths=(96, 192, 384, 768), depths=(2, 2, 9, 2))
