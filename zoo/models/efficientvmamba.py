"""EfficientVMamba: state-space scans over every other pixel at high resolution, convolutions at low resolution.

Paper: arXiv:2403.09977, "Atrous Selective Scan for Light Weight Visual Mamba".
Original code: github.com/TerryPei/EfficientVMamba @ 0bc5ee2, classification (Apache-2.0 by its README).
Where the paper's Table 1 and the authors' configs contradict their training logs and parameter counts (the widths of
S), this follows the logs.

Differs from the original: nothing. Its block's dead options (an MLP, a low rank, shared scans) are left out.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.efficientvmamba import EfficientVMambaConfig
from zoo.layers import ConvNorm, DropPath, LayerNorm2d, SqueezeExcite, Stage, alike, drop_path_rates, fuse_activation
from zoo.models._backbone import Backbone
from zoo.ops import selective_scan

STEP = 2  # the atrous scan samples every second row and column
SCANS = STEP**2  # which makes this many interleaved maps, each with its own scan


def dt_rank(dim: int) -> int:
    """Channels that the step sizes of a scan are computed from."""
    return math.ceil(dim / 16)


class AtrousScan(nn.Module):
    """ES2D, the efficient 2D scan of Section 3.2: ``[B, D, H, W] -> [B, H, W, D]``.

    The map is taken apart into four by the parity of row and column, and each is scanned once: those of even rows row
    by row, those of odd rows column by column. Odd sides are padded with zeros at the bottom and on the right.
    """

    fx_leaf = True  # FX cannot trace a branch on the map's size

    def __init__(self, dim: int, *, rank: int, state_size: int) -> None:
        super().__init__()
        self.step = STEP
        self.sizes = [rank, state_size, state_size]
        self.x_proj = nn.Parameter(torch.empty(SCANS, sum(self.sizes), dim))
        self.dt_proj = nn.Parameter(torch.empty(SCANS, dim, rank))
        self.dt_bias = nn.Parameter(torch.empty(SCANS, dim))
        self.A_log = nn.Parameter(torch.empty(SCANS * dim, state_size))  # A = -exp(A_log)
        self.D = nn.Parameter(torch.empty(SCANS * dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's: A is -1, -2, ..., D is 1, and the step sizes start between 0.001 and 0.1, log-uniformly."""
        nn.init.uniform_(self.x_proj, -(self.x_proj.shape[-1] ** -0.5), self.x_proj.shape[-1] ** -0.5)
        nn.init.uniform_(self.dt_proj, -(self.dt_proj.shape[-1] ** -0.5), self.dt_proj.shape[-1] ** -0.5)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.A_log.shape[1] + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        S = self.step
        if H % S or W % S:
            x = F.pad(x, (0, W % S, 0, H % S))
        h, w = x.shape[2] // S, x.shape[3] // S
        x = x.unflatten(3, [w, S]).unflatten(2, [h, S])  # [B, D, h, row parity, w, column parity]
        by_row = x[:, :, :, 0].permute(0, 4, 1, 2, 3).flatten(3)  # [B, column parity, D, h * w]
        by_column = x[:, :, :, 1].permute(0, 4, 1, 3, 2).flatten(3)  # [B, column parity, D, w * h]
        x = torch.stack((by_row, by_column), 2).flatten(1, 2)  # [B, scans, D, L]

        dt, b, c = (self.x_proj @ x).split(self.sizes, 2)
        dt = self.dt_proj @ dt
        u, dt, a, bias = x.flatten(1, 2), dt.flatten(1, 2), -self.A_log.exp(), self.dt_bias.flatten()
        if torch.jit.is_scripting():
            y, _ = torch.ops.zoo.selective_scan(u, dt, a, b, c, self.D, None, bias, True)
        else:
            y = selective_scan(u, dt, a, b, c, self.D, delta_bias=bias, delta_softplus=True)

        y = y.unflatten(1, [S, S, -1])  # [B, column parity, row parity, D, L]
        by_row = y[:, :, 0].unflatten(3, [h, w]).permute(0, 3, 4, 1, 2)
        by_column = y[:, :, 1].unflatten(3, [w, h]).permute(0, 4, 3, 1, 2)
        y = torch.stack((by_row, by_column), 2)  # [B, h, row parity, w, column parity, D]
        return y.flatten(3, 4).flatten(1, 2)[:, :H, :W]


class GlobalBranch(nn.Module):
    """SS2D with the atrous scan: ``[B, H, W, dim] -> [B, H, W, dim]``. A gated state-space layer, as in Mamba."""

    def __init__(self, dim: int, *, scan_dim: int, state_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * scan_dim, bias=False)
        self.conv = nn.Conv2d(scan_dim, scan_dim, 3, padding=1, groups=scan_dim)
        self.act = nn.SiLU()
        self.scan = AtrousScan(scan_dim, rank=dt_rank(dim), state_size=state_size)
        self.norm = nn.LayerNorm(scan_dim)
        self.out_proj = nn.Linear(scan_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.act(self.conv(x.permute(0, 3, 1, 2)))
        return self.out_proj(self.norm(self.scan(x)) * self.act(z))


class LocalBranch(nn.Sequential):
    """Depthwise and pointwise convolution: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw = ConvNorm(dim, dim, 3, groups=dim, bias=True)
        self.act = nn.GELU()
        self.pw = nn.Conv2d(dim, dim, 1)


class ChannelGate(nn.Module):
    """Scales each channel by a gate computed from its mean after layer norm: ``[B, H, W, dim] -> [B, H, W, dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, dim // 8)
        self.act = nn.GELU()
        self.expand = nn.Linear(dim // 8, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.expand(self.act(self.reduce(gate))).sigmoid()


class ScanBlock(nn.Module):
    """EVSS (Figure 4): scan and convolution side by side, through one channel gate; residual.

    ``[B, dim, H, W] -> [B, dim, H, W]``.
    """

    def __init__(self, dim: int, *, scan_dim: int, state_size: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_branch = GlobalBranch(dim, scan_dim=scan_dim, state_size=state_size)
        self.local_branch = LocalBranch(dim)
        self.gate = ChannelGate(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        local = self.local_branch(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.gate(self.global_branch(y)) + self.gate(local)
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class InvertedResidual(nn.Module):
    """MobileNetV2's block with squeeze-and-excitation; residual: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, *, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.dw = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.se = SqueezeExcite(hidden, ratio=0.125)
        self.project = ConvNorm(hidden, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.act(self.dw(self.act(self.expand(x)))))
        return x + self.drop_path(self.project(y))

    def fuse(self) -> "InvertedResidual":
        """Let the convolutions take over the activation."""
        fuse_activation(self, "act", "expand", "dw")
        return self


class PatchMerging(nn.Module):
    """Swin's: ``[B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]``, odd sides padded with zeros."""

    fx_leaf = True  # as the scan

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, W % 2, 0, H % 2))
        x = x.unflatten(3, [-1, 2]).unflatten(2, [-1, 2])  # [B, dim, h, row parity, w, column parity]
        x = x.permute(0, 2, 4, 5, 3, 1).flatten(3)  # [B, h, w, 4 * dim]
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Sequential):
    """A 4x4 convolution of stride 4, then layer norm: ``[B, in_chans, H, W] -> [B, dim, H/4, W/4]``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = LayerNorm2d(dim)


class EfficientVMamba(Backbone):
    """stem, four stages at strides 4 to 32, layer norm and linear head. Maps are channels-last in memory."""

    fused_memory_format = torch.channels_last

    def __init__(self, config: EfficientVMambaConfig) -> None:
        super().__init__()
        self.stem = PatchEmbedding(config.in_chans, config.widths[0])
        self.stages = nn.Sequential()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, dim in enumerate(config.widths):
            downsample = PatchMerging(config.widths[i - 1], dim) if i else nn.Identity()
            blocks = [self._block(config, i, dim, drop_path=rate) for rate in rates[i]]
            self.stages.append(Stage(downsample, blocks))
        self.norm = LayerNorm2d(config.widths[-1])
        self.finish(config, widths=config.widths, reductions=tuple(4 * 2**i for i in range(len(config.widths))))
        self.reset_parameters()

    @staticmethod
    def _block(config: EfficientVMambaConfig, stage: int, dim: int, *, drop_path: float) -> nn.Module:
        if stage < config.num_scan_stages:
            scan_dim = int(dim * config.scan_ratio)
            return alike(ScanBlock, dim, scan_dim=scan_dim, state_size=config.state_size, drop_path=drop_path)
        return alike(InvertedResidual, dim, hidden=int(dim * config.mlp_ratio), drop_path=drop_path)

    def reset_parameters(self) -> None:
        """Linear layers start as a truncated normal of std 0.02 with zero bias; the rest initialises itself."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)"
        fine = [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))] if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D"))}
