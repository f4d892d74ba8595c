"""Identities of the rules, the solver, and what it says of bad input."""

import math
import random
import warnings
from pathlib import Path

import pytest

import zoo
from zoo.axes import group_channels, nearest_multiple
from zoo.scaling import RULES, ScalingWarning, counts_of, fit, get_rule
from zoo.scaling.rules import fast, language


@pytest.mark.parametrize("name", RULES)
def test_factors_multiply_to_the_cost(name: str) -> None:
    rng = random.Random(name)
    for _ in range(50):
        s = math.exp(rng.uniform(-4, 0 if name == "tiny" else 4))
        assert RULES[name].factors(s).cost == pytest.approx(s, rel=1e-12)
    for alpha in (0.0, 1 / 3, 0.5, 1.0):
        assert fast(3.0, alpha).cost == pytest.approx(3.0, rel=1e-12)


def test_exponents_of_the_fast_rule() -> None:
    factors = fast(10.0)
    assert factors.depth == pytest.approx(10**0.1)
    assert factors.width == pytest.approx(10**0.4)
    assert factors.resolution == pytest.approx(10**0.05)
    assert vars(fast(5.0, 1.0)) == pytest.approx(vars(RULES["width"].factors(5.0)))
    assert fast(5.0, 1 / 3).width == pytest.approx(RULES["dwr"].factors(5.0).width)
    assert fast(5.0, 0.0).depth == pytest.approx(RULES["dr"].factors(5.0).depth)


def test_language_rule_balances_depth_and_width() -> None:
    """Levine et al.: the width is e^(a + 0.0555 layers); a trillion parameters are about 95 layers of 30,000."""
    small = 12 * 24 * 588**2  # 24 layers and the width e^(5.039 + 0.0555 * 24)
    factors = language(1e12 / small, layers=24)
    assert 24 * factors.depth == pytest.approx(95, abs=2)
    assert 588 * factors.width == pytest.approx(30_000, rel=0.05)
    assert language(4.0, layers=24).vocabulary * language(4.0, layers=24).width == pytest.approx(4**0.83)
    assert language(4.0, 0.0, layers=24).vocabulary == 1


def test_every_rule_has_a_source() -> None:
    assert all("arXiv:" in rule.source for rule in RULES.values())


def test_pycls_rounding() -> None:
    rounded = {0.3: 1, 1.2: 1, 2.4: 2, 2.6: 4, 5.4: 4, 6: 8, 11: 8, 12: 16, 20.1: 16, 20.6: 24}
    assert {g: group_channels(g, 1) for g in rounded} == rounded
    assert [nearest_multiple(w, 8) for w in (1, 12, 20, 12.1)] == [8, 16, 16, 16]  # ties go to the even multiple


def test_absolute_and_relative_targets_agree() -> None:
    base = counts_of(zoo.get_config("efficientmod_s")).macs
    config = zoo.scale("efficientmod_s", rule="width", macs=1.5 * base)
    assert config == zoo.scale("efficientmod_s", rule="width", flops=1.5)
    assert config == zoo.scale("efficientmod_s", rule="width", macs="1.5x")
    assert config.depths == zoo.get_config("efficientmod_s").depths


def test_a_target_that_granularity_misses_is_named() -> None:
    with pytest.warns(ScalingWarning, match=r"instead of .* 'depth'"):
        zoo.scale("efficientvit_m0", rule="depth", flops=1.03)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.scale("efficientnet_b0", flops=2.0)


def test_classes_and_channels_are_kept() -> None:
    base = zoo.get_config("efficientvit_m0").override(num_classes=7, in_chans=1, drop_path_rate=0.1)
    config = zoo.scale(base, "fast", factor=2)
    assert (config.num_classes, config.in_chans, config.drop_path_rate) == (7, 1, 0.1)
    tiny = zoo.scale(zoo.get_config("tinynet_a").override(num_classes=7), "tiny", flops=0.3)
    assert tiny.num_classes == 7


def test_lowformers_convolutions_keep_their_kind() -> None:
    base = zoo.get_config("lowformer_b1")
    for s in (0.3, 4.0):
        config = fit(base, "width", factor=s).config
        kinds = [[width < each.fused_below for width in each.widths] for each in (base, config)]
        assert kinds[0] == kinds[1]


def test_a_given_size() -> None:
    found = fit("efficientvit_m0", "fast", flops=3.0, img_size=256)
    assert found.config.img_size == 256
    assert found.met


def test_latency_is_predicted_first_where_the_machine_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made predictions, 30 % too low, and made measurements: three of them at most, whatever was predicted."""
    measured: list[zoo.ModelConfig] = []

    def measure(config: zoo.ModelConfig, device: str) -> float:
        assert device == "cpu"
        measured.append(config)
        return 1.3e-8 * counts_of(config).macs

    monkeypatch.setattr("zoo.scaling.solver.measure_latency", measure)
    monkeypatch.setattr("zoo.analysis.calibrate.predict_latency_ms", lambda config: 1e-8 * counts_of(config).macs)
    found = fit("efficientnet_b0", "fast", latency_ms=8.0)
    assert 1 <= len(measured) <= 3
    assert found.config in measured
    assert (found.quantity, found.target) == ("latency_ms", 8.0)
    assert found.achieved == 1.3e-8 * counts_of(found.config).macs
    assert found.met


def test_latency_without_a_calibration_is_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("zoo.analysis.calibrate.cache_folder", lambda *_: tmp_path)
    monkeypatch.setattr("zoo.scaling.solver.measure_latency", lambda config, _: 1e-8 * counts_of(config).macs)
    found = fit("efficientnet_b0", "fast", latency_ms=8.0)
    assert found.achieved == 1e-8 * counts_of(found.config).macs
    assert found.met


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"factor": 0}, "factor is 0; expected a positive number"),
        ({"flops": -1.0}, "flops is -1.0; expected a positive number"),
        ({"macs": math.nan}, "macs is nan; expected a positive number"),
        ({"width": math.inf}, "width is inf; expected a positive number"),
        ({"params": "fourfold"}, "params is 'fourfold'; expected a positive number, or a multiple such as '4x'"),
        ({"factor": "2"}, "factor is '2'; expected a positive number"),
        ({"factor": True}, "factor is True; expected"),
        ({"macs": 1e3}, "the smallest network .* has"),
        ({"macs": 4e13}, "GiB in float32, and this machine has"),
        ({"macs": 1e15}, "between 1e-6 and 1e6 times"),
        ({"factor": 1e5}, "GiB in float32, and this machine has"),
        ({"factor": 1e9}, "between 1e-6 and 1e6 times"),
        ({}, "Expected one target of factor.*got none"),
        ({"flops": 2.0, "params": "2x"}, "got flops and params"),
        ({"flop": 2.0}, "no option 'flop'.*Did you mean: flops"),
        ({"flops": 2.0, "epochs": 3}, "'fast' has no option 'epochs'; it takes alpha"),
        ({"flops": 2.0, "alpha": 1.5}, "alpha is 1.5; expected 0 to 1"),
        ({"rule": "fats", "flops": 2.0}, "Unknown rule 'fats'.*Did you mean: fast"),
        ({"rule": "d0_w0", "factor": 2.0}, "scales neither"),
        ({"rule": "language", "factor": 2.0}, "no vocabulary to scale.*it can follow depth, width"),
        ({"rule": "tiny", "factor": 2.0}, "only makes networks smaller"),
        ({"rule": "fast", "phi": 1}, "phi belongs to the rule 'compound'"),
        ({"flops": 2.0, "img_size": 250}, "img_size is 250, .* multiples of 16; the nearest are 240 and 256"),
        ({"latency_ms": 0}, "latency_ms is 0; expected a positive number"),
        ({"latency_ms": 5.0, "target": "tpu9"}, "tpu9"),
        ({"flops": 2.0, "weights": "shrink"}, "weights is 'shrink'; expected 'grow'"),
    ],
)
def test_bad_input(arguments: dict, problem: str) -> None:
    with pytest.raises(zoo.ConfigError, match=problem) as raised:
        zoo.scale("efficientvit_m0", **arguments)
    assert "\n" not in str(raised.value)


def test_unknown_model() -> None:
    with pytest.raises(zoo.UnknownModelError, match="efficientvit_m5"):
        zoo.scale("efficientvit_m55", flops=2.0)
    with pytest.raises(zoo.ConfigError, match="expected a name or a config"):
        fit(3, factor=2.0)


def test_get_rule() -> None:
    assert get_rule("w") is RULES["width"]
    assert get_rule("uniform") is RULES["dwr"]
    assert get_rule("d1_w8").factors(4.0).group == 1.0
