"""Every family under every rule that it can follow, with random factors: what has to hold whatever the numbers are."""

import math
import random
import warnings
from typing import Any

import pytest
import torch
from variants import lightest_of_each_family

import zoo
from zoo.analysis.counts import Counts, count, count_forward
from zoo.config import ImageConfig
from zoo.registry import index
from zoo.scaling import Fit, ScalingWarning, counts_of, fit, rules_for

FAMILIES = lightest_of_each_family(index())


def random_factors(rng: random.Random, rule: str, number: int) -> list[float]:
    """In ascending order, from a seventh to seven times."""
    return sorted(math.exp(rng.uniform(-2, 0 if rule == "tiny" else 2)) for _ in range(number))


def test_every_kind_of_model_is_here() -> None:
    families = {index()[name]["family"] for name in FAMILIES}
    assert {"anynet", "regnet", "efficientvmamba", "matmulfree", "mixture_of_recursions"} <= families
    assert all(rules_for(zoo.get_config(name)) for name in FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_valid_configs_that_cost_more_with_every_step(name: str) -> None:
    rng = random.Random(name)
    base = zoo.get_config(name)
    for rule in rules_for(base):
        found = [fit(base, rule, factor=s) for s in random_factors(rng, rule, 5)]
        assert all(zoo.config_from_json(each.config.to_json()) == each.config for each in found)
        # The tiny rule's factors are of the network that a TinyNet was made from, EfficientNet-B0.
        unit = counts_of(base).macs / counts_of(base.scaling_origin()).macs if rule == "tiny" else 1.0
        assert all(each.factors.cost == pytest.approx(each.target * unit, rel=1e-9) for each in found)
        costs = [counts_of(each.config).macs for each in found]
        assert costs == sorted(costs), rule


@pytest.mark.parametrize("name", FAMILIES)
def test_a_factor_of_one_changes_nothing(name: str) -> None:
    base = zoo.get_config(name)
    rules = [rule for rule in rules_for(base) if rule != "tiny"]  # where 1 is EfficientNet-B0, whatever the family
    assert all(fit(base, rule, factor=1).config == base for rule in rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_met_or_named(name: str) -> None:
    rng = random.Random(name)
    for rule in rules_for(zoo.get_config(name)):
        flops = rng.uniform(0.6, 0.9) if rule == "tiny" else rng.uniform(0.8, 3.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = zoo.scale(name, rule, flops=flops)
        found = fit(name, rule, flops=flops)
        assert found.config == config
        assert found.achieved == count(config).macs
        assert found.error == pytest.approx(found.achieved / (flops * counts_of(zoo.get_config(name)).macs) - 1)
        assert [each.category for each in caught] == [ScalingWarning] * (abs(found.error) > 0.02), rule


@pytest.mark.parametrize("name", [name for name in FAMILIES if index()[name]["task"] == "image-classification"])
def test_any_cost_can_be_asked_for_by_width(name: str) -> None:
    """Widths are fine enough in every image family, whatever is counted."""
    target: dict[str, Any] = random.Random(name).choice([{"flops": 2.2}, {"params": "0.6x"}, {"activations": "0.7x"}])
    found = fit(name, "fast", **target)
    assert found.achieved == getattr(count(found.config), found.quantity)
    assert found.met, target


@pytest.mark.parametrize("name", FAMILIES)
def test_scaled_models_run_and_cost_what_torch_says(name: str) -> None:
    """At a small size; the counts, which are of shapes alone, against those of every operator on the meta device."""
    rng = random.Random(name)
    rule = rng.choice(["fast", "dwr"] if "fast" in rules_for(zoo.get_config(name)) else ["dw", "language"])
    config: Any = _small(fit(name, rule, factor=rng.uniform(0.1, 0.5)))
    model: Any = zoo.build(config).eval()
    with torch.no_grad():
        if isinstance(config, ImageConfig):
            assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 3)
        else:
            assert model(torch.zeros(2, 7, dtype=torch.int64)).logits.shape == (2, 7, config.vocab_size)
    assert count(config) == _by_torch(zoo.build(config, device="meta"), config)


def _small(found: Fit) -> Any:
    if isinstance(found.config, ImageConfig):
        return found.config.override(num_classes=3, img_size=64)
    return found.config.override(max_position_embeddings=32)


def _by_torch(model: Any, config: Any) -> Counts:
    with torch.device("meta"):
        if isinstance(config, ImageConfig):
            return count_forward(model, torch.empty(1, 3, 64, 64))
        whole = count_forward(model, torch.empty(1, 32, dtype=torch.int64))
    return Counts(whole.params, round(whole.macs / 32), round(whole.activations / 32))


def test_heads_of_mixtures_of_recursions_stay_whole() -> None:
    base: Any = zoo.get_config("mor_360m_r3_expert")
    for rule in rules_for(base):
        for s in (0.2, 0.7, 1.6, 5.0):
            config: Any = fit(base, rule, factor=s).config
            assert config.head_dim == base.head_dim
            assert config.num_attention_heads == 3 * config.num_key_value_heads
            assert (config.num_hidden_layers - 2) % 3 == 0
    wider: Any = fit(base, "width", factor=4.0).config
    assert (wider.hidden_size, wider.num_attention_heads, wider.intermediate_size) == (1920, 30, 5120)
    assert fit(base, "depth", factor=2.0).config.num_hidden_layers == 65  # 64 less 2, to a multiple of 3


def test_vocabularies_keep_their_special_tokens() -> None:
    base: Any = zoo.get_config("matmulfree_2m")
    smaller: Any = fit(base, "language", factor=0.2).config
    assert smaller.vocab_size == base.eos_token_id + 1
    larger: Any = fit("mor_360m_r3_expert", "language", factor=4.0).config
    assert larger.vocab_size % 64 == 0
    assert larger.vocab_size > 49_152
    assert fit("mor_360m_r3_expert", "language", factor=4.0, vocabulary=0.0).config.vocab_size == 49_152


def test_counting_builds_equal_blocks_once() -> None:
    """Whatever is remembered, a network's counts are the same, and a deep one costs what its blocks add up to."""
    base: Any = zoo.get_config("regnety_002")
    counts = [count(base.override(depths=(1, 1, 1, depth))) for depth in (2, 3, 12)]
    assert counts[2].macs - counts[1].macs == 9 * (counts[1].macs - counts[0].macs)
    assert counts[2].params - counts[1].params == 9 * (counts[1].params - counts[0].params)
    assert count(base.override(depths=(1, 1, 1, 2))) == counts[0]


def test_no_weight_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter of every network that a search counts is on the meta device."""
    made: list[torch.device] = []
    parameter = torch.nn.Parameter.__new__

    def recorded(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made.append(data.device)
        return parameter(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", recorded)
    for name in FAMILIES:
        fit(name, "depth", macs="2.3x")
    assert {device.type for device in made} == {"meta"}
