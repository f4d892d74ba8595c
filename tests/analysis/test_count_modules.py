"""Counts module by module: they add up, follow the dtype, and agree with what papers say of language models."""

import json

import pytest
import torch

import zoo
from zoo.analysis.counts import count, count_modules
from zoo.cli import main


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientmod_xxs", "efficientvmamba_t"])
def test_the_whole_is_what_count_says(name: str) -> None:
    modules = count_modules(name)
    expected = count(name)
    for field in ("params", "macs", "activations"):
        assert getattr(modules[""], field) == getattr(expected, field), field
    children = [path for path in modules if path and "." not in path]
    assert sum(modules[path].macs for path in children) == expected.macs
    assert sum(modules[path].params for path in children) == expected.params
    assert modules[""].activation_bytes == 4 * expected.activations


def test_bytes_follow_the_dtype() -> None:
    single, half = (count_modules("efficientvit_m0", dtype=dtype)[""] for dtype in (torch.float32, torch.float16))
    assert single.activation_bytes == 2 * half.activation_bytes
    assert single.moved_bytes == 2 * half.moved_bytes
    assert half.weight_bytes >= 2 * single.params


def test_a_language_model_by_hand() -> None:
    pytest.importorskip("transformers")
    config = zoo.get_config("matmulfree_2m")
    assert isinstance(config, zoo.TextConfig)
    tokens = 10
    modules = count_modules(config, tokens=tokens)
    layer = "model.layers.0"
    names = ("attn.i_proj", "attn.f_proj", "attn.g_proj", "attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    model = zoo.build(config, device="meta")
    for name in names:  # a ternary layer has a multiply-accumulate for each weight and token
        weight = model.get_submodule(f"{layer}.{name}").weight
        assert modules[f"{layer}.{name}"].macs == tokens * weight.numel(), name
    scan = modules[layer].macs - sum(modules[f"{layer}.{name}"].macs for name in names)
    assert 0 < scan <= 2 * tokens * config.hidden_size
    assert modules["lm_head"].macs == tokens * config.hidden_size * config.vocab_size


def test_routing_costs_its_linear_layers_for_the_tokens_that_reach_them() -> None:
    config = zoo.get_config("mor_2m_r3")  # recursions keep all tokens, two thirds, one third
    counts = count_modules(config, tokens=60)
    kept = [counts[f"model.routers.{i}"].macs / config.hidden_size for i in range(3)]  # type: ignore[attr-defined]
    assert kept == [60, 60, 40]
    assert counts[""].macs < count_modules(config.override(router="none"), tokens=60)[""].macs


def test_wrong_sizes() -> None:
    with pytest.raises(zoo.ConfigError, match="takes no tokens"):
        count_modules("efficientvit_m0", tokens=3)


def test_command_counts_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["profile", "efficientvit_m0", "--device", "meta", "--depth", "1", "--precision", "bf16", "--json"])
    assert stop.value.code == 0
    modules = json.loads(capsys.readouterr().out)
    assert set(modules) == {"", "patch_embed", "stages", "norm", "global_pool", "head"}
    assert modules[""]["macs"] == count("efficientvit_m0").macs
