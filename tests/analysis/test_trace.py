"""Traces against counts, arithmetic by hand, and the same network on another device or with other kernels."""

import pytest
import torch
from torch import nn

import zoo
from zoo.analysis.bench import example_input
from zoo.analysis.counts import count
from zoo.analysis.trace import by_module, trace


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientmod_xxs", "lowformer_b0", "efficientvmamba_t"])
def test_fused_models_on_the_cpu_count_like_plain_ones_on_meta(name: str) -> None:
    config = zoo.get_config(name).override(img_size=64)
    model = zoo.build(config).eval().fuse()
    image = example_input(config, 1)
    operators = trace(model, image, clock="cpu")
    expected = count(config)
    assert sum(operator.macs for operator in operators) == expected.macs
    assert sum(operator.results for operator in operators) == expected.activations
    assert all(operator.seconds is not None for operator in operators)
    again = trace(zoo.build(config).eval().fuse(), image)  # what packs weights in a first pass is not counted
    assert [operator.key for operator in again] == [operator.key for operator in operators]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        return y + y.transpose(2, 3)


def test_sizes_by_hand() -> None:
    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(8 * 9, 5))
    operators = trace(model, torch.zeros(2, 4, 3, 3))
    assert model.training
    assert [operator.kind for operator in operators] == [
        "pointwise conv",
        "norm",
        "elementwise",
        "elementwise",
        "matmul",
    ]
    conv, norm, relu, add, linear = operators
    assert (conv.macs, conv.weights, conv.read, conv.written) == (2 * 9 * 32, 32, 2 * 4 * 9, 2 * 8 * 9)
    assert (norm.macs, norm.weights, norm.read) == (0, 4 * 8, 2 * 8 * 9)  # weight, bias, mean and variance
    assert (relu.read, relu.written, add.read) == (144, 144, 288)
    assert (linear.macs, linear.weights) == (2 * 72 * 5, 72 * 5 + 5)
    assert [operator.module for operator in operators] == ["0.conv", "0.norm", "0", "0", "2"]
    modules = by_module(operators)
    assert sum(operator.macs for operator in modules[""]) == conv.macs + linear.macs
    assert modules["0"] == operators[:4]


def test_scans_and_attention_have_macs() -> None:
    operators = trace(zoo.build(zoo.get_config("efficientvmamba_t")).eval(), torch.zeros(1, 3, 64, 64))
    assert sum(operator.macs for operator in operators if operator.kind == "scan") > 0
    with torch.device("meta"):
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.empty(1, 5, 8, device="meta")
    operators = trace(attention, x, x, x)
    assert sum(operator.macs for operator in operators) == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
