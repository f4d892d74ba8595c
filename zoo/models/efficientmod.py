"""EfficientMod: values modulated by their context, a depthwise convolution, with a little attention at the end.

Paper: arXiv:2403.19963 (ICLR 2024), "Efficient Modulation for Vision Networks".
Original code: github.com/ma-xu/EfficientMod @ ec04df6, models/EfficientMod.py (Apache-2.0).
Where the paper's Table 8 contradicts the code and the parameter counts (the last stage of S), this follows the code.

Differs from the original: nothing. The block's dead options (several kernel sizes, no context) are left out.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.efficientmod import EfficientModConfig
from zoo.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    Mlp,
    PackedConv2d,
    PackedLinear,
    Stage,
    TruncNormalLinear,
    alike,
    drop_path_rates,
    fold_layer_scale,
    is_hooked,
    is_plain_inference,
)
from zoo.models._backbone import Backbone


class Context(nn.Module):
    """What is around each position (Eq. 3): ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int, *, kernel_size: int) -> None:
        super().__init__()
        self.f = TruncNormalLinear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.act = nn.GELU()
        self.g = TruncNormalLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.f(x).permute(0, 3, 1, 2)))
        return self.g(x.permute(0, 2, 3, 1))


class ModulationMlp(nn.Module):
    """An MLP whose hidden layer is multiplied by the context (Section 3.3): ``[B, H, W, dim] -> [B, H, W, dim]``.

    It is ``ratio`` times as wide as the context, and each part of it is modulated alike.
    """

    def __init__(self, dim: int, *, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.context = Context(dim, kernel_size=kernel_size)
        self.fc1 = TruncNormalLinear(dim, dim * ratio)
        self.act = nn.GELU() if ratio > 1 else nn.Identity()
        self.fc2 = TruncNormalLinear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x)
        x = self.act(self.fc1(x))
        # In place: new memory for the product costs more than the product.
        x = x.unflatten(-1, [self.ratio, -1]).mul_(context.unsqueeze(-2))
        return self.fc2(x.flatten(-2))


class ModulationBlock(nn.Module):
    """Modulation, residual: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int, *, ratio: int, kernel_size: int, layer_scale_init: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = ModulationMlp(dim, ratio=ratio, kernel_size=kernel_size)
        self.ls = LayerScale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> "FusedModulationBlock":
        """The same for inference."""
        return FusedModulationBlock(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(self.mlp(self.norm(x))))


def attend(qkv: Tensor) -> Tensor:
    """Attention among N positions; queries, keys, values: ``[B, N, 3, heads, K] -> [B, N, heads * K]``."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention over the whole map: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int, *, num_heads: int, min_head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = max(dim // num_heads, min_head_dim)
        inner = num_heads * self.head_dim
        self.qkv = TruncNormalLinear(dim, 3 * inner, bias=False)
        self.proj = TruncNormalLinear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        y = attend(self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim))
        return self.proj(y.unflatten(1, [H, W]))


class AttentionBlock(nn.Module):
    """Attention and MLP, each residual: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int, *, num_heads: int, min_head_dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads, min_head_dim=min_head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> "FusedAttentionBlock":
        """The same for inference."""
        return FusedAttentionBlock(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def rows_of(x: Tensor) -> Tensor:
    """A copy of a map, ``[B, H, W, dim]``, as ``[B * H * W, dim]``, contiguous, to be written over."""
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 2)


def run_norm(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    """``norm(rows)``, where the rows are written over later; a hook sees a copy of them."""
    if is_hooked(norm):
        return norm(rows.clone())
    return F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class FusedBlock(nn.Module):
    """A block for inference, ``[B, H, W, dim] -> [B, H, W, dim]``: its layers side by side, each activation in one.

    At batch 1, the modules and checks between the layers cost a tenth of the time; :meth:`run` has none. Where another
    layer has taken the place of one, all are called as modules are.

    Attributes:
        kinds: The types of the layers, in order.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._compute(x)
        else:  # TorchScript does not compile this branch
            if self._is_whole() and is_plain_inference(x, x):
                return self._run(rows_of(x), x.shape).view(x.shape)
            return self._compute(x)

    @torch.jit.unused
    def run(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """A forward pass in which :func:`is_plain_inference` is not asked again; hooks are called.

        Args:
            rows: ``[B * H * W, dim]``, as is what it returns, in their place; no hook holds either.
            shape: ``[B, H, W, dim]``.
        """
        if is_hooked(self) or not self._is_whole():
            return self(rows.view(shape)).flatten(0, 2).clone()
        return self._run(rows, shape)

    @torch.jit.unused
    def _is_whole(self) -> bool:
        return tuple(map(type, self._modules.values())) == self.kinds

    def _run(self, rows: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FusedModulationBlock(FusedBlock):
    """A :class:`ModulationBlock`, whose layer scale is folded into its last layer."""

    kinds = (nn.LayerNorm, PackedLinear, PackedConv2d, PackedLinear, PackedLinear, PackedLinear)

    def __init__(self, block: ModulationBlock) -> None:
        super().__init__()
        mlp, context = block.mlp, block.mlp.context
        fold_layer_scale(block, "ls", mlp.fc2)
        self.ratio = mlp.ratio
        self.norm = block.norm
        self.f = PackedLinear.of(context.f)
        self.conv = PackedConv2d.of(context.conv, context.act)
        self.g = PackedLinear.of(context.g)
        self.fc1 = PackedLinear.of(mlp.fc1, mlp.act if mlp.ratio > 1 else None)
        self.fc2 = PackedLinear.of(mlp.fc2)

    @torch.jit.unused
    def _run(self, rows: Tensor, shape: torch.Size) -> Tensor:
        layers: Any = self._modules.values()
        norm, f, conv, g, fc1, fc2 = layers
        normed = run_norm(norm, rows)
        context = conv.run(f.run(normed).view(shape).permute(0, 3, 1, 2))
        context = g.run(context.permute(0, 2, 3, 1).flatten(0, 2))
        values = fc1.run(normed)
        values.view(len(rows), self.ratio, -1).mul_(context.unsqueeze(1))
        return fc2.add_to(rows, values)

    def _compute(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        context = self.g(self.conv(self.f(normed).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        values = self.fc1(normed).unflatten(-1, [self.ratio, -1]) * context.unsqueeze(-2)
        return x + self.fc2(values.flatten(-2))


class FusedAttentionBlock(FusedBlock):
    """An :class:`AttentionBlock`."""

    kinds = (nn.LayerNorm, PackedLinear, PackedLinear, nn.LayerNorm, PackedLinear, PackedLinear)

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.num_heads, self.head_dim = block.attn.num_heads, block.attn.head_dim
        self.norm1 = block.norm1
        self.qkv = PackedLinear.of(block.attn.qkv)
        self.proj = PackedLinear.of(block.attn.proj)
        self.norm2 = block.norm2
        self.fc1 = PackedLinear.of(block.mlp.fc1, block.mlp.act)
        self.fc2 = PackedLinear.of(block.mlp.fc2)

    @torch.jit.unused
    def _run(self, rows: Tensor, shape: torch.Size) -> Tensor:
        layers: Any = self._modules.values()
        norm1, qkv, proj, norm2, fc1, fc2 = layers
        y = attend(qkv.run(run_norm(norm1, rows)).view(shape[0], shape[1] * shape[2], 3, self.num_heads, self.head_dim))
        proj.add_to(rows, y.flatten(0, 1))
        return fc2.add_to(rows, fc1.run(run_norm(norm2, rows)))

    def _compute(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        y = attend(self.qkv(self.norm1(x)).view(B, H * W, 3, self.num_heads, self.head_dim))
        x = x + self.proj(y).view(x.shape)
        return x + self.fc2(self.fc1(self.norm2(x)))


class PatchEmbedding(nn.Sequential):
    """A strided convolution, then layer norm: ``[B, Cin, H, W] -> [B, dim, H / stride, W / stride]``, rounded up."""

    def __init__(self, in_channels: int, dim: int, kernel_size: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, kernel_size, stride, kernel_size // 2)
        self.norm = LayerNorm2d(dim)


class ChannelsLastStage(Stage):
    """A stage whose blocks take ``[B, H, W, dim]``: ``[B, dim_in, H, W] -> [B, dim, H', W']``."""

    fused = False

    def fuse(self) -> "ChannelsLastStage":
        """Run the fused blocks, one after the other, without asking each."""
        self.fused = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        if torch.jit.is_scripting():
            x = self.blocks(x)
        else:  # TorchScript does not compile this branch
            straight = self.fused and is_plain_inference(x, x) and not is_hooked(self.blocks)
            x = self._run_blocks(x) if straight else self.blocks(x)
        return x.permute(0, 3, 1, 2)

    @torch.jit.unused
    def _run_blocks(self, x: Tensor) -> Tensor:
        rows = rows_of(x)
        for block in self.blocks:
            known = isinstance(block, FusedBlock)
            rows = block.run(rows, x.shape) if known else rows_of(block(rows.view(x.shape)))  # type: ignore[operator]
        return rows.view(x.shape)


class EfficientMod(Backbone):
    """stem, four stages at strides 4 to 32, layer norm and linear head.

    Fusing folds the layer scales and unnests the blocks.
    """

    fused_memory_format = torch.channels_last

    def __init__(self, config: EfficientModConfig) -> None:
        super().__init__()
        self.stem = PatchEmbedding(config.in_chans, config.widths[0], 7, stride=4)
        self.stages = nn.Sequential()
        depths = tuple(map(sum, zip(config.depths, config.attention_depths, strict=True)))
        for i, rates in enumerate(drop_path_rates(config.drop_path_rate, depths)):
            dim = config.widths[i]
            downsample = PatchEmbedding(config.widths[i - 1], dim, 3, stride=2) if i else nn.Identity()
            self.stages.append(
                ChannelsLastStage(downsample, [self._block(config, i, j, rate) for j, rate in enumerate(rates)])
            )
        self.norm = LayerNorm2d(config.widths[-1])
        self.finish(config, widths=config.widths, reductions=tuple(4 * 2**i for i in range(len(config.widths))))

    @staticmethod
    def _block(config: EfficientModConfig, stage: int, index: int, drop_path: float) -> nn.Module:
        dim = config.widths[stage]
        if index < config.depths[stage]:
            return alike(
                ModulationBlock,
                dim,
                ratio=config.expand_ratios[index % len(config.expand_ratios)],
                kernel_size=config.kernel_size,
                layer_scale_init=config.layer_scale_init,
                drop_path=drop_path,
            )
        return alike(
            AttentionBlock,
            dim,
            num_heads=config.num_heads,
            min_head_dim=config.min_head_dim,
            mlp_ratio=config.mlp_ratios[stage],
            drop_path=drop_path,
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, self.drop_rate, self.training))

    def make_head(self, num_classes: int) -> nn.Module:
        return TruncNormalLinear(self.num_features, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)"
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))] if coarse else fine}
