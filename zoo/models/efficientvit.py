"""EfficientViT (MSRA): memory-efficient vision transformers with cascaded group attention.

Paper: arXiv:2305.07027 (CVPR 2023).
Original code: github.com/microsoft/Cream @ 4a13c40, EfficientViT/classification (MIT).
Parameter names are timm's, so that its weights on the Hub load as they are. Not to be confused with the EfficientViT of
the MIT HAN lab (arXiv:2205.14756).

Differs from the original: any input size, square or not; a model also runs at sizes other than the one it was built
for, where windows are zero-padded as the original pads maps that its window does not divide.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.efficientvit import EfficientViTConfig
from zoo.layers import AttentionBias, ConvNorm, DropPath, NormLinear, SqueezeExcite, Stage, alike, drop_path_rates
from zoo.models._backbone import Backbone


class Residual(nn.Module):
    """``x + drop_path(m(x))``."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Let a depthwise convolution add its input itself: that is 1 more in the centre of its kernel."""
        conv: Any = self.m
        if not isinstance(conv, nn.Conv2d):
            return self
        conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
        return conv


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with ReLU between: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden, dim, norm_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))

    def fuse(self) -> nn.Module:
        return nn.Sequential(self.pw1, self.act, self.pw2)


class CascadedGroupAttention(AttentionBias):
    """Each head attends on its own part of the channels plus the output of the head before it (Section 2.2, Eq. 2-4).

    ``[B, dim, S, S] -> [B, dim, S, S]`` where ``S`` is ``window``.
    """

    def __init__(self, dim: int, *, num_heads: int, key_dim: int, window: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = key_dim**-0.5
        self.key_dim = key_dim
        self.value_dim = dim // num_heads
        self.qkvs = nn.ModuleList(ConvNorm(dim // num_heads, 2 * key_dim + self.value_dim) for _ in range(num_heads))
        self.dws = nn.ModuleList(ConvNorm(key_dim, key_dim, kernel_sizes[i], groups=key_dim) for i in range(num_heads))
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, norm_weight=0.0))
        self.init_attention_bias(num_heads, (window, window))

    def reset_parameters(self) -> None:
        """Set the attention biases to zero and rebuild their index."""
        self.reset_attention_bias()

    def fuse(self) -> nn.Module:
        return FusedGroupAttention(self)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        bias = self.attention_bias()
        parts = x.chunk(len(self.qkvs), dim=1)
        part = parts[0]
        outputs = []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):  # noqa: B905 -- TorchScript knows no strict=
            if i > 0:
                part = part + parts[i]
            q, k, v = qkv(part).split([self.key_dim, self.key_dim, self.value_dim], dim=1)
            q = dw(q).flatten(2) * self.scale  # [B, key_dim, N]
            attention = q.transpose(-2, -1) @ k.flatten(2) + bias[i]  # [B, N, N]
            part = (v.flatten(2) @ attention.softmax(dim=-1).transpose(-2, -1)).view(B, self.value_dim, H, W)
            outputs.append(part)
        return self.proj(torch.cat(outputs, 1))


class FusedGroupAttention(AttentionBias):
    """A :class:`CascadedGroupAttention` in eval mode, on channels-last maps and in fewer operators.

    The convolutions on q take over the scale, and the bias is gathered once, as nothing will train it any more.
    """

    @torch.no_grad()
    def __init__(self, attention: CascadedGroupAttention) -> None:
        super().__init__()
        self.key_dim = attention.key_dim
        self.value_dim = attention.value_dim
        self.qkvs = attention.qkvs
        self.dws = attention.dws
        self.proj = attention.proj
        self.init_attention_bias(len(attention.qkvs), attention.bias_hw)
        self.freeze_attention_bias()
        self.attention_biases = attention.attention_bias()
        self.attention_bias_idxs = attention.attention_bias_idxs
        dw: Any
        for dw in self.dws:
            dw.weight.mul_(attention.scale)
            dw.bias.mul_(attention.scale)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        parts = x.chunk(len(self.qkvs), dim=1)
        part = parts[0].contiguous(memory_format=torch.channels_last)
        outputs = []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):  # noqa: B905 -- TorchScript knows no strict=
            if i > 0:
                part = part + parts[i]
            q, k, v = qkv(part).split([self.key_dim, self.key_dim, self.value_dim], dim=1)
            q = dw(q).flatten(2).transpose(-2, -1)  # [B, N, key_dim]
            attention = torch.baddbmm(self.attention_biases[i], q, k.flatten(2)).softmax(dim=-1)  # [B, N, N]
            part = torch.bmm(attention, v.flatten(2).transpose(-2, -1))  # [B, N, value_dim]
            part = part.view(B, H, W, self.value_dim).permute(0, 3, 1, 2)
            outputs.append(part)
        return self.proj(torch.cat(outputs, 1))


class LocalWindowAttention(nn.Module):
    """Cascaded group attention in square windows: ``[B, dim, H, W] -> [B, dim, H, W]``.

    A map that is not one window is padded with zeros to a multiple of the window, at the bottom and on the right.
    """

    fx_leaf = True  # FX cannot trace a branch on the map's size: zoo.integrations.timm makes this a leaf of its graphs

    def __init__(self, dim: int, *, num_heads: int, key_dim: int, window: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.window = window
        self.attn = CascadedGroupAttention(
            dim, num_heads=num_heads, key_dim=key_dim, window=window, kernel_sizes=kernel_sizes
        )

    def set_window(self, window: int) -> None:
        """Change the window's side."""
        self.window = window
        self.attn.resize_attention_bias((window, window))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        S = self.window
        if H == S and W == S:
            return self.attn(x)
        x = F.pad(x, (0, -W % S, 0, -H % S))
        rows, columns = x.shape[2] // S, x.shape[3] // S
        # [B, C, rows * S, columns * S] -> [B * rows * columns, C, S, S]
        x = x.view(B, C, rows, S, columns, S).permute(0, 2, 4, 1, 3, 5).reshape(B * rows * columns, C, S, S)
        x = self.attn(x)
        x = x.view(B, rows, columns, C, S, S).permute(0, 3, 1, 4, 2, 5).reshape(B, C, rows * S, columns * S)
        return x[:, :, :H, :W].contiguous()


class EfficientViTBlock(nn.Module):
    """The sandwich of Figure 3: convolution and MLP, one attention, convolution and MLP; each residual.

    ``[B, dim, H, W] -> [B, dim, H, W]``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        key_dim: int,
        window: int,
        kernel_sizes: tuple[int, ...],
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.dw0 = Residual(ConvNorm(dim, dim, 3, groups=dim, norm_weight=0.0), drop_path)
        self.ffn0 = Residual(ConvMlp(dim, hidden), drop_path)
        self.mixer = Residual(
            LocalWindowAttention(dim, num_heads=num_heads, key_dim=key_dim, window=window, kernel_sizes=kernel_sizes),
            drop_path,
        )
        self.dw1 = Residual(ConvNorm(dim, dim, 3, groups=dim, norm_weight=0.0), drop_path)
        self.ffn1 = Residual(ConvMlp(dim, hidden), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class PatchMerging(nn.Module):
    """Inverted bottleneck of stride 2 with squeeze-excite: ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = dim * 4
        self.conv1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden, ratio=0.25)
        self.conv3 = ConvNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))

    def fuse(self) -> nn.Module:
        return nn.Sequential(self.conv1, self.act, self.conv2, self.act, self.se, self.conv3)


class Downsample(nn.Sequential):
    """Between stages: convolution and MLP, patch merging, convolution and MLP."""

    def __init__(self, dim: int, out_dim: int, *, mlp_ratio: float) -> None:
        super().__init__()
        self.res1 = self._residual_pair(dim, mlp_ratio)
        self.patchmerge = PatchMerging(dim, out_dim)
        self.res2 = self._residual_pair(out_dim, mlp_ratio)

    @staticmethod
    def _residual_pair(dim: int, mlp_ratio: float) -> nn.Sequential:
        return nn.Sequential(Residual(ConvNorm(dim, dim, 3, groups=dim)), Residual(ConvMlp(dim, int(dim * mlp_ratio))))


class PatchEmbedding(nn.Sequential):
    """Four 3x3 convolutions of stride 2: ``[B, in_chans, H, W] -> [B, dim, H/16, W/16]``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 8, 3, stride=2)
        self.relu1 = nn.ReLU()
        self.conv2 = ConvNorm(dim // 8, dim // 4, 3, stride=2)
        self.relu2 = nn.ReLU()
        self.conv3 = ConvNorm(dim // 4, dim // 2, 3, stride=2)
        self.relu3 = nn.ReLU()
        self.conv4 = ConvNorm(dim // 2, dim, 3, stride=2)


class EfficientViT(Backbone):
    """patch_embed, three stages at strides 16, 32 and 64, batch norm and linear head."""

    fused_memory_format = torch.channels_last

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config.in_chans, config.widths[0])
        self.stages = nn.Sequential()
        windows = self._windows(config)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, dim in enumerate(config.widths):
            if i == 0:
                downsample: nn.Module = nn.Identity()
            else:
                downsample = Downsample(config.widths[i - 1], dim, mlp_ratio=config.mlp_ratio)
            blocks = [
                alike(
                    EfficientViTBlock,
                    dim,
                    num_heads=config.num_heads[i],
                    key_dim=config.key_dim,
                    window=windows[i],
                    kernel_sizes=config.kernel_sizes,
                    mlp_ratio=config.mlp_ratio,
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            self.stages.append(Stage(downsample, blocks))
        reductions = tuple(16 * 2**i for i in range(len(config.widths)))
        self.finish(config, widths=config.widths, reductions=reductions)

    @staticmethod
    def _windows(config: EfficientViTConfig) -> list[int]:
        """Window side per stage: no larger than the map, whose shorter side counts when it is not square."""
        side = min(config.input_hw) // 16
        windows = []
        for limit in config.window_sizes:
            windows.append(min(limit, side))
            side = (side + 1) // 2
        return windows

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def make_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return NormLinear(self.num_features, num_classes, drop_rate=self.drop_rate)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        super().set_input_size(img_size)
        assert isinstance(self.config, EfficientViTConfig)
        stage: Any
        for stage, window in zip(self.stages, self._windows(self.config), strict=False):  # stages may be pruned
            for block in stage.blocks:
                block.mixer.m.set_window(window)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)"
        fine = [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if "attention_biases" in name}
