"""AnyNet: a backbone that a config alone assembles, stage by stage, from the blocks of the zoo.

Paper: arXiv:2003.13678 (CVPR 2020), "Designing Network Design Spaces", Section 3: stem, stages of one kind of block
each, pooled linear head.
Original code: github.com/facebookresearch/pycls @ 46a2452, models/anynet.py (MIT), whose blocks are ResNet's.

Differs from it: the blocks are those of this package's families, and stages may have different ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import make_divisible
from zoo.families.anynet import AnyNetConfig
from zoo.layers import ConvNorm, alike, drop_path_rates
from zoo.models import efficientformer, efficientmod, efficientnet, efficientvmamba, lowformer, regnet
from zoo.models._backbone import Backbone


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


_MAKERS: dict[str, Callable[..., nn.Module]] = {  # one for each of the config's BLOCKS
    "mbconv": _mbconv,
    "fused_mbconv": _fused_mbconv,
    "bottleneck": _bottleneck,
    "modulation": _on_maps(_modulation),
    "pool": _on_maps(_pool),
    "scan": _on_maps(_scan),
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
                stage.append(alike(_MAKERS[config.blocks[i]], config, i, dim, out_dim, stride, rate))
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
