"""AnyNet: a backbone that a config alone assembles, stage by stage, from the blocks of the zoo.

Paper: arXiv:2003.13678 (CVPR 2020), "Designing Network Design Spaces", Section 3: stem, stages of one kind of block
each, pooled linear head.
Original code: github.com/facebookresearch/pycls @ 46a2452, models/anynet.py (MIT), whose blocks are ResNet's.

Differs from it: the blocks are those of this package's families, and stages may have different ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import ImageConfig, axis, last_of_each_size
from zoo.errors import ConfigError, nearest
from zoo.layers import ConvNorm, alike, drop_path_rates, make_divisible
from zoo.models import efficientformer, efficientmod, efficientnet, efficientvmamba, lowformer, regnet
from zoo.models._backbone import Backbone
from zoo.registry import Family


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


class Permuted(nn.Module):
    """A block on ``[B, H, W, dim]`` for maps: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _mbconv(config: AnyNetConfig, i: int, dim: int, out_dim: int, stride: int, drop_path: float) -> nn.Module:
    settings: dict[str, Any] = {"kernel_size": config.kernel_sizes[i], "stride": stride, "se_ratio": config.se_ratio}
    if config.expand_ratios[i] == 1:
        return efficientnet.DepthwiseSeparable(dim, out_dim, drop_path=drop_path, **settings)
    return efficientnet.InvertedResidual(
        dim, out_dim, expand_ratio=config.expand_ratios[i], drop_path=drop_path, **settings
    )


def _fused_mbconv(config: AnyNetConfig, i: int, dim: int, out_dim: int, stride: int, drop_path: float) -> nn.Module:
    conv = lowformer.FusedMBConv(dim, out_dim, expand_ratio=config.expand_ratios[i], stride=stride)
    return lowformer.Residual(conv, drop_path) if stride == 1 and dim == out_dim else conv


def _bottleneck(config: AnyNetConfig, i: int, dim: int, out_dim: int, stride: int, drop_path: float) -> nn.Module:
    return regnet.Bottleneck(
        dim,
        out_dim,
        stride=stride,
        group_size=config.group_sizes[i],
        se_ratio=config.se_ratio,
        drop_path=drop_path,
    )


def _on_maps(block: Callable[[AnyNetConfig, int, int, float], nn.Module]) -> Callable[..., nn.Module]:
    """A block that changes no shape, after a strided convolution where the shape has to change."""

    def make(config: AnyNetConfig, i: int, dim: int, out_dim: int, stride: int, drop_path: float) -> nn.Module:
        made = block(config, i, out_dim, drop_path)
        if stride == 1 and dim == out_dim:
            return made
        return nn.Sequential(ConvNorm(dim, out_dim, 3, stride=stride), made)

    return make


def _modulation(config: AnyNetConfig, i: int, dim: int, drop_path: float) -> nn.Module:
    return Permuted(
        efficientmod.ModulationBlock(
            dim,
            ratio=int(config.expand_ratios[i]),
            kernel_size=config.kernel_sizes[i],
            layer_scale_init=config.layer_scale_init,
            drop_path=drop_path,
        )
    )


def _pool(config: AnyNetConfig, i: int, dim: int, drop_path: float) -> nn.Module:
    numbers = efficientformer.EfficientFormerConfig(
        pool_size=config.kernel_sizes[i],
        mlp_ratio=config.expand_ratios[i],
        layer_scale_init=config.layer_scale_init,
    )
    return efficientformer.Block4d(dim, config=numbers, drop_path=drop_path)


def _scan(config: AnyNetConfig, i: int, dim: int, drop_path: float) -> nn.Module:
    scan_dim = make_divisible(dim * config.expand_ratios[i])
    return efficientvmamba.ScanBlock(dim, scan_dim=scan_dim, state_size=config.state_size, drop_path=drop_path)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "mbconv": _mbconv,  # EfficientNet's inverted residual; depthwise separable where nothing is expanded
    "fused_mbconv": _fused_mbconv,  # LowFormer's, with one widening 3x3 convolution
    "bottleneck": _bottleneck,  # RegNetY's
    "modulation": _on_maps(_modulation),  # EfficientMod's
    "pool": _on_maps(_pool),  # EfficientFormer's block on maps
    "scan": _on_maps(_scan),  # EfficientVMamba's
}


class AnyNet(Backbone):
    """stem, stages, perhaps a last 1x1 convolution, pooled linear classifier.

    The feature levels are the last stages of each stride.
    """

    fused_memory_format = torch.channels_last

    def __init__(self, config: AnyNetConfig) -> None:
        super().__init__()
        self.stem = ConvNorm(config.in_chans, config.stem_width, 3, stride=2)
        self.act = nn.SiLU()
        self.stages = nn.Sequential()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        reductions, reduction, dim = [], 2, config.stem_width
        for i, out_dim in enumerate(config.widths):
            stage = nn.Sequential()
            for j, rate in enumerate(rates[i]):
                stride = config.strides[i] if j == 0 else 1
                stage.append(alike(BLOCKS[config.blocks[i]], config, i, dim, out_dim, stride, rate))
                dim = out_dim
            self.stages.append(stage)
            reduction *= config.strides[i]
            reductions.append(reduction)
        self.norm = nn.Sequential(ConvNorm(dim, config.head_width), nn.SiLU()) if config.head_width else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.finish(
            config,
            widths=tuple(config.widths[i] for i in config.taps),
            reductions=tuple(reductions[i] for i in config.taps),
            num_features=config.head_width or dim,
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act(self.stem(x))

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}


FAMILY = Family(
    "anynet",
    config=AnyNetConfig,
    model=AnyNet,
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
