"""LowFormer: fused convolutions instead of depthwise ones, and attention that runs on a downsampled map.

Paper: arXiv:2409.03460 (WACV 2025); the E variants: arXiv:2603.26551 (IJCV 2026).
Original code: github.com/altair199797/LowFormer @ 661dd34 (Apache-2.0).
Parameter names are timm's, so that its weights on the Hub load as they are.

Differs from the original: B2, which the authors never released, has a block in each of the first two stages, as in
timm; their config has none, and so no downsampling there. Under autocast, convolutions that no norm follows run in
float32.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.lowformer import LowFormerConfig
from zoo.layers import DropPath, TruncNormalLinear, alike, drop_path_rates, fold_norm
from zoo.models._backbone import Backbone


class ConvLayer(nn.Sequential):
    """Convolution, batch norm, Hardswish: ``[B, Cin, H, W] -> [B, Cout, H', W']``. The last two can be left out."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        if norm:
            self.norm = nn.BatchNorm2d(out_channels)
        if act:
            self.act = nn.Hardswish(inplace=True)
        self.norm_weight = norm_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the batch norm's weight to its starting value: 0 makes a residual branch start as nothing."""
        if hasattr(self, "norm"):
            nn.init.constant_(self.norm.weight, self.norm_weight)

    def fuse(self) -> "ConvLayer":
        """Fold the batch norm into the convolution."""
        if hasattr(self, "norm"):
            self.conv = fold_norm(self.conv, self.norm)
            del self.norm
        return self


class FusedMBConv(nn.Sequential):
    """Widening 3x3 convolution, then a 1x1: ``[B, dim, H, W] -> [B, out_dim, H', W']``."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        expand_ratio: float,
        stride: int = 1,
        bias: bool = False,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = round(dim * expand_ratio)
        self.spatial_conv = ConvLayer(dim, hidden, 3, stride=stride, bias=bias)
        self.point_conv = ConvLayer(hidden, out_dim, act=False, norm_weight=norm_weight)


class MBConv(nn.Module):
    """1x1, depthwise and 1x1 convolution with a norm after the last alone: ``[B, dim, H, W] -> [B, dim, H, W]``.

    Under autocast it runs in float32: what no norm keeps small can be large beside its own variation, which is all that
    the norm at the end leaves, and bfloat16 has too few digits for both. timm lost 3 points of B0's accuracy in it, and
    the authors gave norms to these convolutions in a later network for the same reason.
    """

    fx_leaf = True  # FX cannot trace a branch on autocast: zoo.integrations.timm makes this a leaf of its graphs

    def __init__(self, dim: int, *, expand_ratio: float, norm_weight: float = 1.0) -> None:
        super().__init__()
        hidden = round(dim * expand_ratio)
        self.inverted_conv = ConvLayer(dim, hidden, bias=True, norm=False)
        self.depth_conv = ConvLayer(hidden, hidden, 3, groups=hidden, bias=True, norm=False)
        self.point_conv = ConvLayer(hidden, dim, act=False, norm_weight=norm_weight)

    def convolve(self, x: Tensor) -> Tensor:
        """The block in the precision of ``x``."""
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or x.is_meta:  # where there is no autocast to ask for
            return self.convolve(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.convolve(x.float())
        return self.convolve(x)


class ConvAttention(nn.Module):
    """Attention on a map downsampled by ``stride``, and upsampled after it (Section 3.2).

    A strided depthwise convolution before, a strided transposed one after, which is the output projection at the same
    time: ``[B, dim, H, W] -> [B, dim, H, W]``.
    """

    def __init__(self, dim: int, *, stride: int, ratio: float, min_head_dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, int(dim * ratio) // min_head_dim)
        self.head_dim = int(dim // self.num_heads * ratio)
        inner = self.num_heads * self.head_dim
        self.conv_proj = ConvLayer(dim, dim, 3 if stride == 1 else 5, stride=stride, groups=dim, act=False)
        self.pwise = nn.Conv2d(dim, 3 * inner, 1, bias=False)
        self.upsampling: nn.Module
        if stride == 1:
            self.upsampling = nn.ConvTranspose2d(inner, dim, 3, padding=1)
        else:
            self.upsampling = nn.ConvTranspose2d(inner, dim, 2 * stride, stride, padding=stride // 2)

    def fuse(self) -> "ConvAttention":
        """Put an ordinary convolution in the place of a transposed one of stride 1, which is slower."""
        if isinstance(self.upsampling, nn.ConvTranspose2d) and self.upsampling.stride == (1, 1):
            self.upsampling = _as_convolution(self.upsampling)
        return self

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        x = self.pwise(self.conv_proj(x)).permute(0, 2, 3, 1)
        B, h, w, _ = x.shape
        q, k, v = x.reshape(B, h * w, self.num_heads, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, h * w, head_dim]
        x = x.transpose(1, 2).reshape(B, h, w, self.num_heads * self.head_dim).permute(0, 3, 1, 2)
        return self.upsampling(x)[:, :, :H, :W]  # of an odd side, there is a row or column too many


@torch.no_grad()
def _as_convolution(transposed: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution that does what a transposed one of stride 1 and half padding does."""
    weight = transposed.weight.transpose(0, 1).flip(2, 3)
    conv = nn.Conv2d(
        transposed.in_channels,
        transposed.out_channels,
        transposed.kernel_size,  # type: ignore[arg-type]
        padding=transposed.padding,  # type: ignore[arg-type]
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.copy_(weight)
    assert conv.bias is not None
    conv.bias.copy_(transposed.bias)  # type: ignore[arg-type]
    return conv.train(transposed.training)


class Downsample(nn.Module):
    """Halves the map: ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``."""

    def __init__(self, dim: int, out_dim: int, *, expand_ratio: float) -> None:
        super().__init__()
        self.main = FusedMBConv(dim, out_dim, expand_ratio=expand_ratio, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class Residual(nn.Module):
    """``x + drop_path(main(x))``."""

    def __init__(self, main: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.main = main
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.main(x))


class LowFormerBlock(nn.Sequential):
    """Attention, MLP and local convolution, each residual (Figure 4): ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, config: LowFormerConfig, dim: int, *, reduction: int, drop_path: float) -> None:
        super().__init__()
        if config.attention:
            attention: nn.Module = ConvAttention(
                dim,
                stride=max(1, config.attention_reduction // reduction),
                ratio=config.attention_ratio,
                min_head_dim=config.min_head_dim,
            )
            if config.mlp:
                attention = nn.Sequential(nn.GroupNorm(1, dim), attention)
            self.attn = Residual(attention, drop_path)
        if config.mlp:
            hidden = int(dim * config.mlp_ratio)
            mlp = nn.Sequential(
                nn.GroupNorm(1, dim), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)
            )  # fmt: skip
            self.mlp = Residual(mlp, drop_path)
        if dim < config.fused_below:
            local: nn.Module = FusedMBConv(dim, dim, expand_ratio=config.expand_ratio, bias=True, norm_weight=0.0)
        else:
            local = MBConv(dim, expand_ratio=config.expand_ratio, norm_weight=0.0)
        self.local = Residual(local, drop_path)


class LowFormer(Backbone):
    """stem, four stages, hidden layers before and after pooling, linear classifier."""

    head_name = "classifier"
    fused_memory_format = torch.channels_last

    if TYPE_CHECKING:
        classifier: nn.Module

    def __init__(self, config: LowFormerConfig) -> None:
        super().__init__()
        dim = config.stem_width
        stem_rates, *rates = drop_path_rates(config.drop_path_rate, (config.stem_depth, *config.depths))
        self.stem = nn.Sequential(ConvLayer(config.in_chans, dim, 3, stride=2))
        for rate in stem_rates:
            self.stem.append(alike(self._conv_block, dim, config.stem_expand_ratio, rate))
        self.stages = nn.Sequential()
        reductions = tuple(4 * 2**i for i in range(len(config.widths)))
        for i, (out_dim, reduction) in enumerate(zip(config.widths, reductions, strict=True)):
            stage = nn.Sequential(Downsample(dim, out_dim, expand_ratio=config.downsample_expand_ratio))
            dim = out_dim
            if i < config.num_conv_stages:
                stage.extend(alike(self._conv_block, dim, config.expand_ratio, rate) for rate in rates[i][1:])
            else:
                stage.extend(
                    alike(LowFormerBlock, config, dim, reduction=reduction, drop_path=rate) for rate in rates[i]
                )
            self.stages.append(stage)
        width, hidden = config.head_widths
        self.in_conv: nn.Module = ConvLayer(dim, width)
        self.pre_classifier: nn.Module = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.LayerNorm(hidden), nn.Hardswish()
        )
        self.drop = nn.Dropout(config.drop_rate)
        self.finish(config, widths=config.widths, reductions=reductions, head_hidden_size=hidden)
        self.reset_parameters()

    @staticmethod
    def _conv_block(dim: int, expand_ratio: float, drop_path: float) -> Residual:
        return Residual(FusedMBConv(dim, dim, expand_ratio=expand_ratio, norm_weight=0.0), drop_path)

    def reset_parameters(self) -> None:
        """Weights start as a truncated normal of std 0.02, biases at zero; norms initialise themselves."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As :meth:`Backbone.forward_head`; without pooling, the hidden layers act on every position of the map."""
        x = self.global_pool(self.in_conv(x))
        if self.global_pool.pool_type:
            x = self.pre_classifier(x)
        else:
            x = self.pre_classifier(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x if pre_logits else self.classify(x)

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(x))

    def make_head(self, num_classes: int) -> nn.Module:
        return TruncNormalLinear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def prune_head(self) -> None:
        """Remove the classifier, the pooling and the hidden layers."""
        self.in_conv, self.pre_classifier = nn.Identity(), nn.Identity()
        self.head_hidden_size = self.num_features
        super().prune_head()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]}
