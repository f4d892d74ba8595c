"""EfficientFormerV2: depthwise convolution in every block and attention in the last ones, searched for size and speed.

Paper: arXiv:2212.08059 (ICCV 2023).
Original code: github.com/snap-research/EfficientFormer @ d01da42, models/efficientformer_v2.py (MIT and Apache-2.0).
Parameter names are timm's, so that its weights on the Hub load as they are.

Differs from the original: any input size, square or not; a model also runs at sizes other than the one it was built
for; where the stride of attention does not divide a map, what is upsampled is cut to the map's size.
"""

import torch
from torch import Tensor, nn

from zoo.families.efficientformer_v2 import EfficientFormerV2Config
from zoo.layers import ConvNorm, DropPath, LayerScale2d, Stage, alike, drop_path_rates, fold_layer_scale
from zoo.layers.conv_norm import scale_and_shift
from zoo.models._efficientformer import EfficientFormerBase, MapAttention, side_by_side


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2: ``[B, in_chans, H, W] -> [B, dim, H/4, W/4]``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2, bias=True)
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride=2, bias=True)
        self.act2 = nn.GELU()


class ConvMlp(nn.Sequential):
    """The unified feed-forward network, a depthwise convolution between two 1x1 convolutions.

    ``[B, dim, H, W] -> [B, dim, H, W]``.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden, bias=True)
        self.act1 = nn.GELU()
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden, bias=True)
        self.act2 = nn.GELU()
        self.fc2 = ConvNorm(hidden, dim, bias=True)

    def fuse(self) -> nn.Module:
        return nn.Sequential(self.fc1, self.act1, self.mid, self.act2, self.fc2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Positions in a row and channels by head: ``[B, heads * K, H, W] -> [B, heads, K, N]``."""
    return x.flatten(2).unflatten(1, [num_heads, -1])


class Attention2d(MapAttention):
    """Attention over the whole map with talking heads and value locality: ``[B, dim, H, W] -> [B, dim, H, W]``.

    With a stride, it runs on a map that a depthwise convolution makes smaller, and its output is upsampled.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        stride: int,
        map_hw: tuple[int, int],
        reduction: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.reduction = reduction
        self.stride_conv = ConvNorm(dim, dim, 3, stride=stride, groups=dim, bias=True) if stride > 1 else None
        self.upsample = nn.Upsample(scale_factor=stride, mode="bilinear") if stride > 1 else None
        self.q = ConvNorm(dim, num_heads * key_dim, bias=True)
        self.k = ConvNorm(dim, num_heads * key_dim, bias=True)
        self.v = ConvNorm(dim, num_heads * value_dim, bias=True)
        self.v_local = ConvNorm(
            num_heads * value_dim, num_heads * value_dim, 3, groups=num_heads * value_dim, bias=True
        )
        self.talking_head1 = nn.Conv2d(num_heads, num_heads, 1)
        self.talking_head2 = nn.Conv2d(num_heads, num_heads, 1)
        self.act = nn.GELU()
        self.proj = ConvNorm(num_heads * value_dim, dim, bias=True)
        self.init_attention_bias(num_heads, map_hw)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        h, w = x.shape[2:]
        q = split_heads(self.q(x), self.num_heads)
        k = split_heads(self.k(x), self.num_heads)
        v = self.v(x)
        local = self.v_local(v)
        v = split_heads(v, self.num_heads)
        attention = q.transpose(-2, -1) @ k * self.scale + self.attention_bias_at(h, w)  # [B, heads, N, N]
        attention = self.talking_head2(self.talking_head1(attention).softmax(dim=-1))
        x = (v @ attention.transpose(-2, -1)).reshape(local.shape) + local
        if self.upsample is not None:
            x = self.upsample(x)[:, :, :H, :W]
        return self.proj(self.act(x))

    def fuse(self) -> nn.Module:
        return FusedAttention2d(self)


class FusedAttention2d(MapAttention):
    """An :class:`Attention2d` in eval mode, on channels-last maps and in fewer operators.

    The first talking head takes over the scale, and the frozen bias what that head makes of it: both are linear.
    """

    @torch.no_grad()
    def __init__(self, attention: Attention2d) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.reduction = attention.reduction
        self.stride_conv = attention.stride_conv
        self.upsample = attention.upsample
        self.qk = side_by_side(attention.q, attention.k)
        self.v = attention.v
        self.v_local = attention.v_local
        self.talking_head1 = attention.talking_head1
        self.talking_head2 = attention.talking_head2
        self.act = attention.act
        self.proj = attention.proj

        self.init_attention_bias(self.num_heads, attention.bias_hw)
        self.freeze_attention_bias()
        bias, weight, shift = attention.attention_bias(), self.talking_head1.weight, self.talking_head1.bias
        assert shift is not None
        mixed = torch.einsum("ohij,hqk->oqk", weight.double(), bias.double()) + shift.double()[:, None, None]
        self.attention_biases = mixed.to(bias.dtype)
        self.attention_bias_idxs = attention.attention_bias_idxs
        weight.mul_(attention.scale)
        self.talking_head1.bias = None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        h, w = x.shape[2:]
        q, k = split_heads(self.qk(x), 2 * self.num_heads).chunk(2, dim=1)
        x = self.v(x)
        local = self.v_local(x)
        v = split_heads(x, self.num_heads).transpose(-2, -1)
        attention = self.talking_head1(q.transpose(-2, -1) @ k) + self.attention_bias_at(h, w)
        x = self.talking_head2(attention.softmax(dim=-1)) @ v  # [B, heads, N, value_dim]
        x = x.transpose(1, 2).flatten(2).unflatten(1, [h, w]).permute(0, 3, 1, 2) + local
        if self.upsample is not None:
            x = self.upsample(x)[:, :, :H, :W]
        return self.proj(self.act(x))


class LocalGlobalQuery(nn.Module):
    """Queries of attention downsampling, a depthwise convolution and every other position: stride 2."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim)
        self.proj = ConvNorm(dim, out_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.local(x) + x[:, :, ::2, ::2])

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        self.local.weight[:, :, 1, 1] += 1  # the centre of the kernel is where every other position is
        return nn.Sequential(self.local, self.proj)


class Attention2dDownsample(MapAttention):
    """Attention whose queries are on a map half as large: ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        map_hw: tuple[int, int],
        reduction: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.reduction = reduction
        width = num_heads * value_dim
        self.q = LocalGlobalQuery(dim, num_heads * key_dim)
        self.k = ConvNorm(dim, num_heads * key_dim, bias=True)
        self.v = ConvNorm(dim, width, bias=True)
        self.v_local = ConvNorm(width, width, 3, stride=2, groups=width, bias=True)
        self.act = nn.GELU()
        self.proj = ConvNorm(width, out_dim, bias=True)
        self.init_attention_bias(num_heads, map_hw, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.num_heads)
        k = split_heads(self.k(x), self.num_heads)
        v = self.v(x)
        local = self.v_local(v)
        v = split_heads(v, self.num_heads)
        bias = self.attention_bias_at(x.shape[2], x.shape[3])
        attention = q.transpose(-2, -1) @ k * self.scale + bias  # [B, heads, Nq, N]
        x = (v @ attention.softmax(dim=-1).transpose(-2, -1)).reshape(local.shape) + local
        return self.proj(self.act(x))


class Downsample(nn.Module):
    """Between stages, a convolution, with attention downsampling beside it into the last.

    ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``.
    """

    def __init__(self, dim: int, out_dim: int, attn: nn.Module | None) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, out_dim, 3, stride=2, bias=True)
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out if self.attn is None else self.attn(x) + out


class Block(nn.Module):
    """Attention, in the last blocks of the later stages, and the feed-forward network, each residual and scaled.

    ``[B, dim, H, W] -> [B, dim, H, W]``.
    """

    def __init__(
        self, dim: int, token_mixer: Attention2d | None, *, mlp_ratio: float, init: float, drop_path: float
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        if token_mixer is not None:
            self.ls1 = LayerScale2d(dim, init)
            self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale2d(dim, init)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.token_mixer is not None:
            x = x + self.drop_path1(self.ls1(self.token_mixer(x)))
        return x + self.drop_path2(self.ls2(self.mlp(x)))

    def fuse(self) -> nn.Module:
        if self.token_mixer is not None:
            fold_layer_scale(self, "ls1", self.token_mixer.proj)
        fold_layer_scale(self, "ls2", self.mlp[-1])
        return self


class FusedNorm(nn.Module):
    """A batch norm in eval mode, ``scale * x + shift``, where there is no convolution before it to take it over."""

    @torch.no_grad()
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = (tensor.to(norm.weight.dtype).view(-1, 1, 1) for tensor in scale_and_shift(norm))
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class EfficientFormerV2(EfficientFormerBase):
    """stem, four stages at strides 4, 8, 16 and 32, batch norm and two linear heads."""

    def __init__(self, config: EfficientFormerV2Config) -> None:
        super().__init__()
        self.stem = Stem(config.in_chans, config.widths[0])
        self.stages = nn.Sequential()
        reductions = tuple(4 * 2**i for i in range(len(config.widths)))
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, dim in enumerate(config.widths):
            downsample = self._downsample(config, i, reductions[i] // 2) if i else nn.Identity()
            first_attention = config.depths[i] - config.attention_depths[i]
            blocks: list[nn.Module] = [
                alike(
                    Block,
                    dim,
                    self._attention(config, i, reductions[i]) if j >= first_attention else None,
                    mlp_ratio=config.mlp_ratios[i][j],
                    init=config.layer_scale_init,
                    drop_path=rate,
                )
                for j, rate in enumerate(rates[i])
            ]
            self.stages.append(Stage(downsample, blocks))
        self.norm = nn.BatchNorm2d(config.widths[-1])
        self.finish(config, widths=config.widths, reductions=reductions)

    @staticmethod
    def _attention(config: EfficientFormerV2Config, stage: int, reduction: int) -> nn.Module:
        stride = config.attention_strides[stage]
        return alike(
            Attention2d,
            config.widths[stage],
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            value_dim=int(config.key_dim * config.value_ratio),
            stride=stride,
            map_hw=config.map_hw(reduction * stride),
            reduction=reduction * stride,
        )

    @staticmethod
    def _downsample(config: EfficientFormerV2Config, stage: int, reduction: int) -> Downsample:
        dim, out_dim = config.widths[stage - 1], config.widths[stage]
        attn = None
        if config.attention_downsample[stage]:
            attn = Attention2dDownsample(
                dim,
                out_dim,
                num_heads=config.num_heads,
                key_dim=config.downsample_key_dim,
                value_dim=int(config.downsample_key_dim * config.value_ratio),
                map_hw=config.map_hw(reduction),
                reduction=reduction,
            )
        return Downsample(dim, out_dim, attn)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    @torch.jit.ignore
    def fuse_ends(self) -> None:
        """Make one classifier of two, and fuse the last norm."""
        super().fuse_ends()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm = FusedNorm(self.norm)
