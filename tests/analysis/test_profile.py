"""zoo profile: rows add up to the counted whole, ideals follow from the peaks, and the plot is drawn."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import zoo
from zoo.analysis import profile as module
from zoo.analysis.bench import Conditions
from zoo.analysis.benchmark import measure
from zoo.analysis.counts import count
from zoo.analysis.profile import Layer, Peaks, measure_peaks, plot, profile
from zoo.cli import main

QUICK = Conditions(threads=1, rounds=2)
PEAKS = Peaks(macs_per_s=1e10, bytes_per_s=1e10)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", partial(measure, turn_s=0.001, warmup_s=0.0))
    monkeypatch.setattr(module, "PASSES", 1)


@pytest.mark.parametrize("depth", [None, 1, 3])
def test_rows_add_up_to_what_is_counted(depth: int | None) -> None:
    config = zoo.get_config("efficientvit_m0").override(img_size=64)
    found = profile(config, depth=depth, conditions=Conditions(threads=1, rounds=2, fuse=False), peaks=PEAKS)
    expected = count(config)
    for field in ("params", "macs", "activations"):
        assert sum(getattr(layer, field) for layer in found.layers) == getattr(expected, field), field
        assert getattr(found.total, field) == getattr(expected, field)
    assert sum(layer.seconds for layer in found.layers) == pytest.approx(found.total.seconds)
    assert sum(layer.bytes_moved for layer in found.layers) == found.total.bytes_moved
    assert found.computational_efficiency == pytest.approx(expected.macs / 1e10 / found.latency_s)
    assert found.roofline_efficiency >= found.computational_efficiency


def test_the_ideal_is_the_longer_of_arithmetic_and_memory() -> None:
    config = zoo.get_config("efficientvit_m0").override(img_size=64)
    layers = {layer.module: layer for layer in profile(config, conditions=QUICK, peaks=PEAKS).layers}
    for layer in layers.values():
        assert layer.ideal_s == max(layer.macs, layer.bytes_moved) / 1e10
        assert layer.bound == ("arithmetic" if layer.intensity >= PEAKS.waterline else "memory")
    first = layers["patch_embed.conv1"]
    assert first.macs == 32 * 32 * 8 * 27
    assert first.bytes_moved == 4 * (3 * 64 * 64 + 8 * 27 + 8 + 8 * 32 * 32)


def test_efficiency() -> None:
    layer = Layer("x", "conv", 0, 100, 0, 50, seconds=4.0, ideal_s=1.0, bound="arithmetic")
    assert (layer.efficiency, layer.intensity) == (0.25, 2.0)


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GEMM", 64)
    monkeypatch.setattr(module, "COPY_BYTES", 2**16)
    peaks = measure_peaks(QUICK)
    assert peaks.macs_per_s > 1e6
    assert peaks.bytes_per_s > 1e6


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = profile("efficientvit_m0", depth=2, conditions=QUICK, peaks=PEAKS)
    plot(found, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "measure_peaks", lambda conditions: PEAKS)
    with pytest.raises(SystemExit) as stop:
        main(["profile", "efficientvit_m0", "--depth", "1", "--threads", "1"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "patch_embed" in shown
    assert "computational efficiency" in shown
    with pytest.raises(SystemExit):
        main(["profile", "efficientvit_m0", "--depth", "1", "--threads", "1", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["total"]["macs"] == sum(layer["macs"] for layer in values["layers"])


@pytest.mark.parametrize("peak, believed", [(1e5, False), (1e15, True)])
def test_a_model_beyond_the_peak_is_not_believed(
    peak: float, believed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "measure_peaks", lambda conditions: replace(PEAKS, macs_per_s=peak))
    with pytest.raises(SystemExit):
        main(["profile", "efficientvit_m0", "--depth", "1", "--threads", "1"])
    assert ("No model beats the peak" not in capsys.readouterr().out) == believed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["efficientvit_m9"], "Unknown model"),
        (["efficientvit_m0", "--batch", "0"], "expected at least 1"),
        (["efficientvit_m0", "--depth", "0"], "expected at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["profile", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
