"""RegNetY: residual bottlenecks of grouped convolutions with squeeze-and-excitation; widths that grow by a rule.

Paper: arXiv:2003.13678 (CVPR 2020), "Designing Network Design Spaces".
Original code: github.com/facebookresearch/pycls @ 46a2452, models/regnet.py and models/anynet.py (MIT).
Parameter names are timm's, so that its weights on the Hub load as they are.

Differs from the original: nothing. The paper's linear rule for the widths is worked out beforehand: a config lists what
each stage has, as pycls itself does before it scales a network.
"""

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.families.regnet import RegNetConfig
from zoo.layers import ConvNorm, DropPath, alike, drop_path_rates
from zoo.models._backbone import Backbone


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from its global mean: ``[B, dim, H, W] -> [B, dim, H, W]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.act(self.fc1(gate))).sigmoid()


class Bottleneck(nn.Module):
    """The paper's Y block: ``[B, dim, H, W] -> [B, out_dim, ceil(H/stride), ceil(W/stride)]``, nowhere narrower."""

    def __init__(
        self, dim: int, out_dim: int, *, stride: int, group_size: int, se_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride=stride, groups=out_dim // group_size)
        self.se = SqueezeExcite(out_dim, round(dim * se_ratio))
        self.conv3 = ConvNorm(out_dim, out_dim)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        resized = stride != 1 or dim != out_dim
        self.downsample = ConvNorm(dim, out_dim, stride=stride) if resized else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv1(x))
        y = self.se(self.act(self.conv2(y)))
        return self.act(self.drop_path(self.conv3(y)) + self.downsample(x))


class RegNet(Backbone):
    """stem, stages s1 to s4 of blocks b1, b2, ..., pooled linear classifier."""

    fused_memory_format = torch.channels_last
    if TYPE_CHECKING:
        s1: nn.Module
        s2: nn.Module
        s3: nn.Module
        s4: nn.Module
    __jit_unused_properties__ = ["stages"]

    def __init__(self, config: RegNetConfig) -> None:
        super().__init__()
        self.stem = ConvNorm(config.in_chans, config.stem_width, 3, stride=2)
        self.act = nn.ReLU(inplace=True)
        dim = config.stem_width
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, out_dim in enumerate(config.widths):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for j, rate in enumerate(rates[i], start=1):
                blocks[f"b{j}"] = alike(
                    Bottleneck,
                    dim,
                    out_dim,
                    stride=2 if j == 1 else 1,
                    group_size=config.group_sizes[i],
                    se_ratio=config.se_ratio,
                    drop_path=rate,
                )
                dim = out_dim
            self.add_module(f"s{i + 1}", nn.Sequential(blocks))
        self.drop = nn.Dropout(config.drop_rate)
        reductions = tuple(4 * 2**i for i in range(len(config.widths)))
        self.finish(config, widths=config.widths, reductions=reductions)
        for i, level in enumerate(self.feature_info):
            level["module"] = f"s{i + 1}"
        self.reset_parameters()

    @property
    def stages(self) -> Any:  # type: ignore[override]
        """The stages in order, which timm's names keep beside the stem and the head."""
        return [self.get_submodule(f"s{i + 1}") for i in range(len(self.feature_info))]

    @stages.setter  # type: ignore[override]
    def stages(self, kept: list[nn.Module]) -> None:  # type: ignore[override]
        for i in range(len(kept), len(self.feature_info)):
            setattr(self, f"s{i + 1}", nn.Identity())

    def reset_parameters(self) -> None:
        """Convolutions start normal with variance 2 / fan_out, the classifier with a std of 0.01, as in pycls."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.weight[:, 0].numel() / module.groups)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act(self.stem(x))

    def forward_stages(self, x: Tensor) -> Tensor:
        return self.s4(self.s3(self.s2(self.s1(x))))

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))

    def make_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return nn.Sequential(OrderedDict(fc=nn.Linear(self.num_features, num_classes)))

    def get_classifier(self) -> nn.Module:
        return getattr(self.head, "fc", self.head)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^s(\d+)" if coarse else r"^s(\d+)\.b(\d+)"}
