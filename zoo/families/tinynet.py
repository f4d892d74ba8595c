"""TinyNet: EfficientNet-B0 made smaller, by a factor each for resolution, depth and width that was searched for.

Paper: arXiv:2010.14819 (NeurIPS 2020), "Model Rubik's Cube".
Original code: github.com/huawei-noah/Efficient-AI-Backbones @ f90e129, tinynet_pytorch (Apache-2.0), on top of timm.
The network is EfficientNet's; its parameter names are timm's and the authors', so that both kinds of weights load as
they are.

Differs from the original: as EfficientNet here does.
"""

from dataclasses import dataclass

from zoo.axes import TINYNET, Factors, resize
from zoo.families.efficientnet import EfficientNetConfig
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class TinyNetConfig(EfficientNetConfig):
    """An EfficientNet's numbers; :func:`twisted` makes those of the paper's Table 2."""

    def scaling_origin(self) -> "TinyNetConfig":
        """EfficientNet-B0, with this network's input channels, classes and rates."""
        own = ("in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate")
        return TinyNetConfig(**{name: getattr(self, name) for name in own})


FAMILY = Family(
    "tinynet",
    config=TinyNetConfig,
    model="zoo.models.efficientnet:EfficientNet",
    title="TinyNet",
    paper="arXiv:2010.14819",
    code="github.com/huawei-noah/Efficient-AI-Backbones @ f90e129, tinynet_pytorch",
    licence="Apache-2.0",
    first_conv="conv_stem",
    classifier="classifier",
)


def twisted(r: float, d: float, w: float) -> TinyNetConfig:
    """EfficientNet-B0 with its resolution, depth and width multiplied by ``r``, ``d`` and ``w``.

    As in the original code: the side in pixels is rounded down, to no multiple of anything; depths are rounded to the
    nearest, at least 1; widths go to the nearest multiple of 8 that is no more than 10 % below; stem and last
    convolution keep their widths, which only a ``w`` above 1 would change, and that only in the last one.
    """
    return resize(TinyNetConfig(), Factors(d, w, r), TINYNET)


@FAMILY.variant
def tinynet_a() -> TinyNetConfig:
    """6.2 M parameters, 339 MMACs at 192 px, 76.8 % top-1."""
    return twisted(r=0.86, d=1.2, w=1.0)


@FAMILY.variant
def tinynet_b() -> TinyNetConfig:
    """3.7 M parameters, 202 MMACs at 188 px, 75.0 % top-1."""
    return twisted(r=0.84, d=1.1, w=0.75)


@FAMILY.variant
def tinynet_c() -> TinyNetConfig:
    """2.5 M parameters, 100 MMACs at 184 px, 71.2 % top-1."""
    return twisted(r=0.825, d=0.85, w=0.54)


@FAMILY.variant
def tinynet_d() -> TinyNetConfig:
    """2.3 M parameters, 52 MMACs at 152 px, 67.0 % top-1."""
    return twisted(r=0.68, d=0.695, w=0.54)


@FAMILY.variant
def tinynet_e() -> TinyNetConfig:
    """2.0 M parameters, 24 MMACs at 106 px, 59.9 % top-1."""
    return twisted(r=0.475, d=0.60, w=0.51)
