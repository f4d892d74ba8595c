"""zoo pick on made-up records: who wins under which limit, and why the others do not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.analysis import pick as module
from zoo.analysis.benchmark import Passport, Timing, machine, passport
from zoo.analysis.pick import Budget, Option, gather, options, pareto_set, pick, published
from zoo.analysis.records import save_records
from zoo.cli import main


def record(model: str, ms: float, *, batch: int = 1, **changes: Any) -> Passport:
    seconds = tuple(factor * ms / 1e3 for factor in (0.99, 1.0, 1.01))
    made = passport(
        Timing(rounds=seconds, times=seconds, warmup_calls=1, settled=True),
        device="cpu",
        batch=batch,
        threads=1,
        model=model,
        input=(batch, 3, 224, 224),
        backend="eager, fused",
        working_memory=10_000_000,
        weight_memory=4 * zoo.registry.index()[model.split(".")[0]]["params"],
        command=f"zoo bench {model}",
    )
    return dataclasses.replace(made, **changes)


RECORDS = [
    record("efficientvit_m0", 5.0),
    record("efficientvit_m0", 40.0, batch=16),
    record("efficientvit_m5", 12.0),
    record("efficientformer_l1", 20.0),
    record("efficientformerv2_s0", 15.0),  # less accurate than efficientvit_m5, and slower
    record("tinynet_e", 2.0),
]


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    save_records(RECORDS, path)
    monkeypatch.setattr(module, "local_records", lambda: path)
    monkeypatch.setattr(module, "shipped_records", lambda: [])
    return path


def names(found: "list[Option] | tuple[Option, ...]") -> list[str]:
    return [option.model for option in found]


def test_an_option_joins_figures_accuracy_and_licence() -> None:
    option = {each.model: each for each in options(RECORDS)}["efficientvit_m0"]
    weights = zoo.get_weights("efficientvit_m0.r224_in1k")
    assert (option.weights, option.top1, option.licence) == (weights.name, weights.metrics[0].top1, weights.licence)
    assert option.latency_ms == pytest.approx(5.0)
    assert (option.images_per_s, option.throughput_batch) == (pytest.approx(400.0), 16)
    assert option.memory_mb == pytest.approx(option.size_mb + 10)
    assert option.here


def test_the_most_accurate_within_the_budget_wins_and_the_next_follow() -> None:
    choice = pick(latency_ms=13, shortlist=False)
    assert choice.best is not None
    assert choice.best.model == "efficientvit_m5"
    assert names(choice.runners_up) == ["efficientvit_m0", "tinynet_e"]
    assert names(choice.pareto) == ["tinynet_e", "efficientvit_m0", "efficientvit_m5"]


def test_with_only_an_accuracy_the_fastest_wins() -> None:
    best = pick(top1=75, shortlist=False).best
    assert best is not None
    assert best.model == "efficientvit_m5"
    best = pick(top1=60, shortlist=False).best
    assert best is not None
    assert best.model == "efficientvit_m0"


@pytest.mark.parametrize(
    "limits, answer",
    [
        ({"params_m": 3.0}, "efficientvit_m0"),
        ({"size_mb": 11.0}, "efficientvit_m0"),
        ({"macs_m": 400.5}, "efficientformerv2_s0"),
        ({"images_per_s": 300.0}, "efficientvit_m0"),
        ({"memory_mb": 25.0}, "efficientformerv2_s0"),
        ({"licence": "mit"}, "efficientvit_m5"),
        ({"runtime": "eager, fused", "latency_ms": 2.5}, "tinynet_e"),
    ],
)
def test_every_limit_counts(limits: dict[str, Any], answer: str) -> None:
    best = pick(**limits, shortlist=False).best
    assert best is not None
    assert best.model == answer


def test_only_figures_of_so_many_threads(store: Path) -> None:
    save_records([record("efficientformer_l1", 9.0, threads=2)], store)
    latencies = {(option.model, option.latency_ms) for option in gather(threads=2)}
    assert latencies == {("efficientformer_l1", 9.0)}
    best = pick(latency_ms=13, threads=1, shortlist=False).best
    assert best is not None
    assert (best.model, best.threads) == ("efficientvit_m5", 1)
    with pytest.raises(zoo.DataError, match="this machine's cpu, threads 3: run"):
        pick(latency_ms=13, threads=3, shortlist=False)


def test_why_not_says_what_was_exceeded_by_how_much() -> None:
    choice = pick(latency_ms=13, shortlist=False)
    assert choice.why_not("efficientformer_l1") == ("efficientformer_l1: latency is 20 ms, 1.54 times the 13 allowed.")
    assert "is the answer" in choice.why_not("efficientvit_m5")
    assert "points of accuracy at 2.40 times its latency" in choice.why_not("efficientvit_m0")
    assert "no record of it on cpu; `zoo bench lowformer_b1` makes one" in choice.why_not("lowformer_b1")
    with pytest.raises(zoo.UnknownModelError, match="Did you mean"):
        choice.why_not("efficientvit_m9")


def test_others_records_take_part_only_when_asked_for_and_are_named(store: Path) -> None:
    theirs = record("lowformer_b1", 1.0, machine="0badc0de", cpu="Other CPU", measured_by="someone")
    save_records([theirs], store)
    assert "lowformer_b1" not in names(gather())
    option = next(each for each in gather(others=True) if each.model == "lowformer_b1")
    assert not option.here
    assert option.where == f"Other CPU ({machine()['cores']} cores), by someone"
    best = pick(latency_ms=3, others=True).best
    assert best is not None
    assert best.model == "lowformer_b1"


def test_the_shortlist_is_measured(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    class Predicts:
        threads, clock, precision = 1, "cpu", "fp32"

        def predict_ms(self, name: str) -> float:
            return {"lowformer_b0": 6.0, "tinynet_a": 4.0}.get(name, 100.0)

    asked: list[list[str]] = []

    def fake_bench(models: list[str], **_: Any) -> None:
        asked.append(models)
        save_records([record(name, 4.5) for name in models], store)

    monkeypatch.setattr("zoo.analysis.calibrate.find_calibration", Predicts)
    monkeypatch.setattr("zoo.analysis.bench.bench", fake_bench)
    choice = pick(latency_ms=5)
    assert asked == [["lowformer_b0", "tinynet_a"]]  # the more accurate first; 6 ms may turn out to be 5
    assert choice.measured == ("lowformer_b0", "tinynet_a")
    assert choice.best is not None
    assert choice.best.model == "lowformer_b0"


def test_the_pareto_set_keeps_what_only_a_limited_cost_speaks_for() -> None:
    found = options(RECORDS)
    assert "efficientformerv2_s0" not in names(pareto_set(found))
    assert "efficientformerv2_s0" in names(pareto_set(found, ["params_m"]))


def test_accuracy_is_that_of_the_resolution_and_classes_that_were_measured() -> None:
    assert published("efficientvit_m0").name == "efficientvit_m0.r224_in1k"
    assert published("efficientvit_m0.zoo_cifar10") is None


def test_nothing_measured_says_what_to_run(store: Path) -> None:
    store.write_text("")
    with pytest.raises(zoo.DataError, match="Nothing is measured on this machine's cpu: run `zoo calibrate`"):
        pick(latency_ms=5, shortlist=False)


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"latency": 3}, "no limit 'latency'; expected latency_ms"),
        ({"device": "cpuu"}, r"device is 'cpuu'; expected cpu, cuda, mps\. Did you mean: cpu"),
        ({"latency_ms": -1}, "latency_ms is -1; expected a number above 0"),
        ({"size_mb": float("nan")}, "size_mb is nan"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
    ],
)
def test_bad_limits(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        pick(**limits)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pick", "--latency-ms", "13", "--no-shortlist"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--why-not", "efficientformer_l1"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("efficientvit_m5")
    assert "runners-up" in shown
    assert "1.54 times the 13 allowed" in shown
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["best"]["model"] == "efficientvit_m5"
    with pytest.raises(SystemExit) as stop:
        main(["pick", "--latency-ms", "1", "--no-shortlist"])
    assert stop.value.code == 2
    assert "No model fits. The nearest is tinynet_e: latency is 2 ms" in capsys.readouterr().err
    assert Budget(latency_ms=5).device == "cpu"
