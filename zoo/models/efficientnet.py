"""EfficientNet: mobile inverted bottlenecks with squeeze-and-excitation, scaled by one rule in depth, width and size.

Paper: arXiv:1905.11946 (ICML 2019).
Original code: github.com/tensorflow/tpu, models/official/efficientnet (Apache-2.0). This is its PyTorch form in timm,
with symmetric padding and PyTorch's batch norm, whose parameter names these are, so that its weights on the Hub load as
they are; the ``tf_efficientnet`` weights need TensorFlow's padding and are another model.

Differs from both: the rate of stochastic depth reaches ``drop_path_rate`` at the last block, not one step short of it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.config import make_divisible
from zoo.families.efficientnet import EfficientNetConfig
from zoo.layers import DropPath, FusedSqueezeExcite, alike, drop_path_rates, fuse_activation, fuse_pairs
from zoo.models._backbone import Backbone


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from its global mean: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, hidden, 1)
        self.act = nn.SiLU(inplace=True)
        self.conv_expand = nn.Conv2d(hidden, dim, 1)

    def fuse(self) -> FusedSqueezeExcite:
        """Scale in place, for inference only: the network's largest maps are not allocated a second time."""
        return FusedSqueezeExcite(self.conv_reduce, self.act, self.conv_expand, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(self.act(self.conv_reduce(gate))).sigmoid()


class FusedBottleneck(nn.Sequential):
    """Either bottleneck below in eval mode: the layers in their order, and their input added where it is residual."""

    def __init__(self, *layers: nn.Module, is_residual: bool) -> None:
        super().__init__(*layers)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y if self.is_residual else y


class DepthwiseSeparable(nn.Module):
    """The bottleneck without expansion: ``[B, dim, H, W] -> [B, out_dim, ceil(H/stride), ceil(W/stride)]``."""

    def __init__(
        self, dim: int, out_dim: int, *, kernel_size: int, stride: int, se_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.is_residual = stride == 1 and dim == out_dim
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.act = nn.SiLU(inplace=True)
        self.se = SqueezeExcite(dim, max(1, round(dim * se_ratio)))
        self.conv_pw = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> FusedBottleneck:
        """Fold the batch norms into the convolutions."""
        fuse_pairs(self, conv_dw="bn1", conv_pw="bn2")
        return FusedBottleneck(self.conv_dw, self.act, self.se, self.conv_pw, is_residual=self.is_residual)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.act(self.bn1(self.conv_dw(x))))
        y = self.bn2(self.conv_pw(y))
        return x + self.drop_path(y) if self.is_residual else y


class InvertedResidual(nn.Module):
    """MobileNetV2's bottleneck with squeeze-and-excitation, the paper's MBConv.

    ``[B, dim, H, W] -> [B, out_dim, ceil(H/stride), ceil(W/stride)]``.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        kernel_size: int,
        stride: int,
        expand_ratio: float,
        se_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        hidden = make_divisible(dim * expand_ratio)
        self.is_residual = stride == 1 and dim == out_dim
        self.conv_pw = nn.Conv2d(dim, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU(inplace=True)
        self.se = SqueezeExcite(hidden, max(1, round(dim * se_ratio)))
        self.conv_pwl = nn.Conv2d(hidden, out_dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> FusedBottleneck:
        """Fold the batch norms into the convolutions."""
        fuse_pairs(self, conv_pw="bn1", conv_dw="bn2", conv_pwl="bn3")
        layers = self.conv_pw, self.act, self.conv_dw, self.act, self.se, self.conv_pwl
        return FusedBottleneck(*layers, is_residual=self.is_residual)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.se(self.act(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return x + self.drop_path(y) if self.is_residual else y


class EfficientNet(Backbone):
    """conv_stem, stages of blocks, conv_head, pooled linear classifier.

    The feature levels are the last stages at strides 2, 4, 8, 16 and 32.
    """

    stages_name = "blocks"
    head_name = "classifier"
    fused_memory_format = torch.channels_last

    if TYPE_CHECKING:
        classifier: nn.Module

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(config.in_chans, config.stem_width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem_width)
        self.act1 = nn.SiLU(inplace=True)
        self.blocks = nn.Sequential()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        reductions, reduction, dim = [], 2, config.stem_width
        for i, out_dim in enumerate(config.widths):
            stage = nn.Sequential()
            for j, rate in enumerate(rates[i]):
                stride = config.strides[i] if j == 0 else 1
                stage.append(self._block(config, i, dim, out_dim, stride=stride, drop_path=rate))
                dim = out_dim
            self.blocks.append(stage)
            reduction *= config.strides[i]
            reductions.append(reduction)
        self.conv_head = nn.Conv2d(dim, config.head_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(config.head_width)
        self.act2 = nn.SiLU(inplace=True)
        self.drop = nn.Dropout(config.drop_rate)
        self.finish(
            config,
            widths=tuple(config.widths[i] for i in config.taps),
            reductions=tuple(reductions[i] for i in config.taps),
            num_features=config.head_width,
        )
        self.reset_parameters()

    @staticmethod
    def _block(
        config: EfficientNetConfig, stage: int, dim: int, out_dim: int, *, stride: int, drop_path: float
    ) -> nn.Module:
        kernel_size, expand_ratio = config.kernel_sizes[stage], config.expand_ratios[stage]
        settings: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "se_ratio": config.se_ratio}
        if expand_ratio == 1:
            return alike(DepthwiseSeparable, dim, out_dim, drop_path=drop_path, **settings)
        return alike(InvertedResidual, dim, out_dim, expand_ratio=expand_ratio, drop_path=drop_path, **settings)

    def reset_parameters(self) -> None:
        """Convolutions start normal with variance 2 / fan_out, as in the original code; the rest as PyTorch has it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (module.weight[:, 0].numel() / module.groups)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv_stem(x)))

    def forward_stages(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def forward_final(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv_head(x)))

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(x))

    def prune_norm(self) -> None:
        """Remove what is not part of a feature level: the last convolution with its norm and activation."""
        for name in ("conv_head", "bn2", "act2"):
            setattr(self, name, nn.Identity())

    @torch.jit.ignore
    def fuse_ends(self) -> None:
        """Fold the first and the last batch norm, with the activations."""
        fuse_pairs(self, conv_stem="bn1", conv_head="bn2")
        for conv, act in (("conv_stem", "act1"), ("conv_head", "act2")):
            if isinstance(getattr(self, conv), nn.Conv2d):  # not pruned
                fuse_activation(self, act, conv)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        return {"stem": r"^(?:conv_stem|bn1)\.", "blocks": [(blocks, None), (r"^(?:conv_head|bn2)\.", (99999,))]}
