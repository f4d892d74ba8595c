"""EfficientLLM's six metrics: how each follows from what is measured, and that energy is never made up."""

import json
from functools import partial
from pathlib import Path

import pytest

import zoo
from zoo.analysis import energy
from zoo.analysis import language as module
from zoo.analysis.bench import Conditions
from zoo.analysis.benchmark import measure
from zoo.analysis.language import six_metrics
from zoo.analysis.profile import Peaks
from zoo.cli import main

PEAKS = Peaks(macs_per_s=1e10, bytes_per_s=1e10)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(module, "measure", partial(measure, turn_s=0.001, warmup_s=0.0))
    monkeypatch.setattr(module, "measure_peaks", lambda conditions: PEAKS)
    monkeypatch.setattr(energy, "_RAPL", tmp_path)


@pytest.fixture
def small() -> zoo.TextConfig:
    config = zoo.get_config("matmulfree_2m").override(num_hidden_layers=2, vocab_size=500)
    assert isinstance(config, zoo.TextConfig)
    return config


def test_the_six_follow_from_what_is_measured(small: zoo.TextConfig) -> None:
    conditions = Conditions(threads=1, rounds=3, tokens=16)
    found = six_metrics(small, batch=2, new_tokens=4, conditions=conditions, peaks=PEAKS)
    assert [row[0] for row in found.rows()] == ["AMU", "PCU", "AL", "IT", "AEC", "MCR"]
    assert found.it_tokens_per_s == pytest.approx(2 / (found.al_ms / 1e3))
    assert found.prompt_tokens_per_s == pytest.approx(2 * 16 / (found.first_token_ms / 1e3))
    assert found.mcr == pytest.approx(0.5, rel=0.01)  # 32-bit parameters are twice the size of 16-bit ones
    assert found.pcu_percent > 0
    assert found.aec_joules_per_token is None
    assert "not measured: no RAPL counters" in found.rows()[4][2]
    assert found.amu_bytes is None or found.amu_bytes > 4 * 500 * small.hidden_size


def test_energy_is_what_the_counters_say(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("9000000")
    (package / "energy_uj").write_text("8000000")
    meter = energy.EnergyMeter("cpu")
    (package / "energy_uj").write_text("8500000")
    meter.update()
    assert (meter.joules, meter.source) == (pytest.approx(0.5), "RAPL, whole packages")
    (package / "energy_uj").write_text("1000000")
    meter.update()
    assert meter.joules == pytest.approx(2.0)  # the counter started again


def test_only_language_models() -> None:
    with pytest.raises(zoo.ConfigError, match="is no language model"):
        six_metrics("efficientvit_m0")


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--threads", "1", "--rounds", "1", "--tokens", "8", "--six-metrics"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "matmulfree_2m", *options])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "compute utilisation" in shown
    assert "not measured" in shown
    with pytest.raises(SystemExit):
        main(["bench", "matmulfree_2m", *options, "--json"])
    assert json.loads(capsys.readouterr().out)[0]["model"] == "matmulfree_2m"
