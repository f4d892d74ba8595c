"""Counts against the golden cases, fvcore, and arithmetic by hand."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.analysis.counts import Counts, count, count_forward
from zoo.registry import index

MODELS = zoo.list_models(task="image-classification")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_golden_counts(name: str, shared: Path) -> None:
    case = json.loads((shared / "golden" / f"{name}.json").read_text())
    operators = case["macs_by_operator"]
    counts = count(name)
    assert counts.params == case["params"]
    assert counts.macs == operators["conv"] + operators["matmul"] + operators["linear"]


def attention_in_steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def scan_macs(inputs: list[Any], outputs: list[Any]) -> int:
    (batch, channels, length), (_, states) = inputs[0].type().sizes(), inputs[2].type().sizes()
    return (9 * states + 1) * batch * channels * length


def scan_activations(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(outputs[0].type().sizes())


# The heavy ones differ in numbers alone, and fvcore runs them.
@pytest.mark.parametrize("name", [name for name in MODELS if index()[name]["macs"] < 5e9])
def test_agrees_with_fvcore(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is a development dependency")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention_in_steps)  # unknown to fvcore
    model = zoo.create_model(name).eval()
    inputs = torch.zeros(1, 3, *model.config.input_hw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of branches on shapes
        activations = fvcore.ActivationCountAnalysis(model, inputs).unsupported_ops_warnings(False)
        activations.set_op_handle("zoo::selective_scan", scan_activations)
        flops = fvcore.FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
        by_operator = flops.set_op_handle("zoo::selective_scan", scan_macs).by_operator()
        assert count(name).activations == activations.total()
    # fvcore calls a multiply-accumulate one FLOP, and counts norms and pooling besides.
    operators = ("conv", "linear", "addmm", "matmul", "bmm", "einsum", "selective_scan")
    assert count(name).macs == sum(by_operator[operator] for operator in operators)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(8 * 16, 5))
    model[0].weight.requires_grad_(False)
    counts = count_forward(model, torch.zeros(1, 3, 8, 8))
    assert counts == Counts(params=128 * 5 + 5, macs=16 * 8 * 27 + 128 * 5, activations=8 * 16 + 5)
    assert model.training


def test_attention_in_one_kernel_counts_like_attention_in_steps() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    tokens, width = 10, 4
    assert count_forward(Attention(), torch.zeros(1, 1, tokens, width)).macs == 2 * tokens * tokens * width


def test_size_and_config() -> None:
    config = zoo.get_config("efficientvit_m0")
    assert count(config) == count("efficientvit_m0")
    doubled = count(config, img_size=448)
    assert doubled == count(config.override(img_size=448))
    assert doubled.macs > 3.5 * count(config).macs


def test_only_image_models() -> None:
    with pytest.raises(zoo.ConfigError, match=r"^ModelConfig is no image model's config"):
        count(zoo.ModelConfig())
