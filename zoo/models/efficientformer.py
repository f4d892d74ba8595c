"""EfficientFormer: convolution-like blocks on feature maps, then transformer blocks on tokens, for mobile latency.

Paper: arXiv:2206.01191 (NeurIPS 2022).
Original code: github.com/snap-research/EfficientFormer @ d01da42, models/efficientformer.py (MIT and Apache-2.0).
Parameter names are timm's, so that its weights on the Hub load as they are. The paper calls blocks on maps 4D and
blocks on tokens 3D, after the dimensions of their tensors.

Differs from the original: any input size, square or not, where the original refuses all but 224 x 224; features are
``[B, C, H, W]`` also after the blocks on tokens.
"""

import torch
from torch import Tensor, nn

from zoo.families.efficientformer import EfficientFormerConfig
from zoo.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    LayerScale2d,
    Mlp,
    Stage,
    TruncNormalLinear,
    alike,
    drop_path_rates,
    fold_layer_scale,
    fold_norm,
    fuse_pairs,
)
from zoo.models._efficientformer import EfficientFormerBase, MapAttention


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2: ``[B, in_chans, H, W] -> [B, dim, H/4, W/4]``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act2 = nn.ReLU()

    def fuse(self) -> nn.Module:
        fuse_pairs(self, conv1="norm1", conv2="norm2")
        return self


class Downsample(nn.Sequential):
    """Between stages: ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def fuse(self) -> nn.Module:
        fuse_pairs(self, conv="norm")
        return self


class ConvMlp(nn.Sequential):
    """Two 1x1 convolutions with GELU between: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def fuse(self) -> nn.Module:
        return nn.Sequential(fold_norm(self.fc1, self.norm1), self.act, fold_norm(self.fc2, self.norm2))


class Pooling(nn.Module):
    """PoolFormer's token mixer, how far each position is from the mean of its surroundings: ``pool(x) - x``."""

    def __init__(self, pool_size: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Block4d(nn.Module):
    """Pooling and MLP on a map, each residual and scaled: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, *, config: EfficientFormerConfig, drop_path: float) -> None:
        super().__init__()
        self.token_mixer = Pooling(config.pool_size)
        self.ls1 = LayerScale2d(dim, config.layer_scale_init)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = ConvMlp(dim, int(dim * config.mlp_ratio))
        self.ls2 = LayerScale2d(dim, config.layer_scale_init)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.token_mixer(x)))
        return x + self.drop_path2(self.ls2(self.mlp(x)))

    def fuse(self) -> nn.Module:
        return FusedBlock4d(self)


class FusedBlock4d(nn.Module):
    """A :class:`Block4d` in eval mode, in fewer operators."""

    def __init__(self, block: Block4d) -> None:
        super().__init__()
        self.pool = block.token_mixer.pool
        self.gamma = nn.Parameter(block.ls1.gamma.detach().view(-1, 1, 1))
        fold_layer_scale(block, "ls2", block.mlp[-1])
        self.mlp = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        pooled, gamma = self.pool(x), self.gamma.to(x.dtype)
        if torch.jit.is_scripting():
            x = torch.lerp(x, pooled, gamma)  # x + gamma * (pooled - x)
        else:  # TorchScript does not compile this branch
            # ONNX has no lerp; what is put in its place are six operators, two of them a choice.
            exporting = torch.compiler.is_compiling()
            x = x + gamma * (pooled - x) if exporting else torch.lerp(x, pooled, gamma)
        return x + self.mlp(x)


class ToTokens(nn.Module):
    """``[B, C, H, W] -> [B, H, W, C]``: from blocks on maps to blocks on tokens, whose places are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()


class Attention(MapAttention):
    """Multi-head attention over the whole map, with LeViT's bias: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(
        self, dim: int, *, num_heads: int, key_dim: int, value_dim: int, map_hw: tuple[int, int], reduction: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.reduction = reduction
        self.scale = key_dim**-0.5
        self.qkv = TruncNormalLinear(dim, num_heads * (2 * key_dim + value_dim))
        self.proj = TruncNormalLinear(num_heads * value_dim, dim)
        self.init_attention_bias(num_heads, map_hw)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, [self.num_heads, -1]).transpose(1, 2)  # [B, heads, N, q + k + v]
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        attention = q @ k.transpose(-2, -1) * self.scale + self.attention_bias_at(H, W)
        x = attention.softmax(dim=-1) @ v  # [B, heads, N, value_dim]
        return self.proj(x.transpose(1, 2).flatten(2).unflatten(1, [H, W]))


class Block3d(nn.Module):
    """Attention and MLP on tokens, each residual and scaled: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int, *, config: EfficientFormerConfig, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mixer = Attention(
            dim,
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            value_dim=int(config.key_dim * config.value_ratio),
            map_hw=config.map_hw(reduction),
            reduction=reduction,
        )
        self.ls1 = LayerScale(dim, config.layer_scale_init)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.ls2 = LayerScale(dim, config.layer_scale_init)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.token_mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def fuse(self) -> nn.Module:
        fold_layer_scale(self, "ls1", self.token_mixer.proj)
        fold_layer_scale(self, "ls2", self.mlp.fc2)
        return self


class MixedStage(Stage):
    """A stage of 4D blocks, then 3D blocks if there are any: ``[B, dim_in, H, W] -> [B, dim, H', W']``."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__(downsample, blocks)
        self.ends_in_tokens = isinstance(blocks[-1], Block3d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.downsample(x))
        return x.permute(0, 3, 1, 2) if self.ends_in_tokens else x


class EfficientFormer(EfficientFormerBase):
    """stem, four stages at strides 4, 8, 16 and 32, layer norm and two linear heads."""

    def __init__(self, config: EfficientFormerConfig) -> None:
        super().__init__()
        self.stem = Stem(config.in_chans, config.widths[0])
        self.stages = nn.Sequential()
        reductions = tuple(4 * 2**i for i in range(len(config.widths)))
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, dim in enumerate(config.widths):
            downsample = Downsample(config.widths[i - 1], dim) if i else nn.Identity()
            first_3d = config.depths[i] - config.attention_depths[i]
            blocks: list[nn.Module] = [
                alike(Block4d, dim, config=config, drop_path=rate) for rate in rates[i][:first_3d]
            ]
            if config.attention_depths[i]:
                blocks.append(ToTokens())
            for rate in rates[i][first_3d:]:
                blocks.append(alike(Block3d, dim, config=config, reduction=reductions[i], drop_path=rate))
            self.stages.append(MixedStage(downsample, blocks))
        self.norm = LayerNorm2d(config.widths[-1])
        self.finish(config, widths=config.widths, reductions=reductions)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)
