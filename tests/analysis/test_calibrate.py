"""Calibration: the fit recovers a known law on models it has not seen, and predictions need nothing to run."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.analysis import calibrate as module
from zoo.analysis.bench import Conditions, as_measured, example_input
from zoo.analysis.benchmark import measure
from zoo.analysis.calibrate import (
    Sample,
    calibrate,
    fit,
    left_out_errors,
    load_calibration,
    operators_of,
    predict_latency_ms,
    table_and_features,
)
from zoo.analysis.trace import trace
from zoo.cli import main


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "measure", partial(measure, turn_s=0.001))
    monkeypatch.setattr(module, "PASSES", 1)
    monkeypatch.setattr(module, "cache_folder", lambda kind: tmp_path)


def made_up(models: int, *, rate: float, per_operator: float) -> list[Sample]:
    """Models whose operators take MACs / rate, and whose latency is 1.1 times their sum and a constant for each."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(models):
        sizes = torch.randint(10**4, 10**8, (20 + 5 * i,), generator=generator).tolist()
        rows = tuple(("conv", (math.log1p(size), 1.0), size / rate) for size in sizes)
        latency = 1.1 * sum(row[2] for row in rows) + per_operator * len(rows)
        samples.append(Sample(f"m{i}", f"family{i % 3}", 1, rows, latency))
    return samples


def test_a_known_law_is_found_again() -> None:
    samples = made_up(12, rate=1e9, per_operator=2e-3)
    fitted = fit(samples)
    assert fitted.scale == pytest.approx(1.1, rel=0.01)
    assert fitted.per_operator == pytest.approx(2e-3, rel=0.05)
    assert fitted.tables["conv"].seconds((math.log1p(5e6), 1.0)) == pytest.approx(5e-3, rel=0.02)
    errors = left_out_errors(samples, [sample.family for sample in samples])
    assert len(errors) == 12
    assert max(map(abs, errors)) < 0.02


def test_errors_are_of_models_that_the_fit_has_not_seen() -> None:
    samples = made_up(6, rate=1e9, per_operator=0.0)
    odd = Sample("odd", "odd", 1, samples[0].rows, 10 * samples[0].latency)
    errors = left_out_errors([*samples, odd], ["known"] * 6 + ["odd"])
    assert errors[-1] == pytest.approx(-0.9, abs=0.02)


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientmod_xxs", "lowformer_b0", "efficientvmamba_t"])
def test_the_operators_of_a_config_are_those_that_run(name: str) -> None:
    config = zoo.get_config(name).override(img_size=64)
    model = as_measured(zoo.build(config), Conditions())
    x = example_input(config, 2)
    trace(model, x)
    assert operators_of(config, 2) == [table_and_features(operator) for operator in trace(model, x)]


def test_calibrate_predict_and_read_again(tmp_path: Path) -> None:
    names = ["efficientvit_m0", "tinynet_e", "efficientvit_m1"]
    found = calibrate(names, conditions=Conditions(threads=1, rounds=1))
    assert load_calibration(threads=1) == found
    assert set(found.errors()) == {"models", "families"}
    small = zoo.get_config("efficientvit_m0")
    larger = small.override(depths=(2, 3, 4))  # a config that has no name
    assert 0 < predict_latency_ms(small, threads=1) < predict_latency_ms(larger, threads=1)
    next(tmp_path.glob("calibration-*.json")).write_text("{}")
    with pytest.raises(zoo.DataError, match="is damaged; remove it and run `zoo calibrate`"):
        load_calibration(threads=1)


def test_without_a_calibration_the_command_is_named() -> None:
    with pytest.raises(zoo.DataError, match="not calibrated for cpu; run `zoo calibrate --device cpu --threads 3"):
        predict_latency_ms("efficientvit_m0", threads=3)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["efficientvit_m0", "tinynet_e", "efficientvit_m1"]
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *names, "--threads", "1", "--rounds", "1"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "median error on models left out" in shown
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "efficientvit_m0"])
    assert stop.value.code == 2
    assert "expected at least 3" in capsys.readouterr().err


@pytest.mark.parametrize("condition", [{"precision": "bf16"}, {"backend": "compile"}, {"fuse": False}], ids=str)
def test_conditions_that_no_prediction_is_of(condition: dict[str, Any]) -> None:
    (name,) = condition
    with pytest.raises(zoo.ConfigError, match=f"{name} is .*; expected .* to calibrate"):
        calibrate(conditions=Conditions(**condition))
