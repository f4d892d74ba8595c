"""zoo bench: which batches it measures, what its records say and where they go."""

import csv
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import zoo
from zoo.analysis import bench as module
from zoo.analysis.bench import Conditions, bench, resolve, saturating_batch
from zoo.analysis.benchmark import measure
from zoo.analysis.records import as_csv, key, local_records, read_records, save_records
from zoo.cli import main
from zoo.deploy.engines import Job
from zoo.deploy.single import run_in_engine

QUICK = Conditions(threads=1, clock="cpu", rounds=2)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SLOW", 0.0)  # no batch above 1 is tried
    monkeypatch.setattr(module, "measure", partial(measure, turn_s=0.001, warmup_s=0.0))
    monkeypatch.setattr(module, "local_records", lambda: tmp_path / "records.jsonl")


@pytest.fixture
def small() -> zoo.ModelConfig:
    return zoo.get_config("efficientvit_m0").override(depths=(1, 1, 1), img_size=64)


def test_records_of_a_config_and_a_name(small: zoo.ModelConfig, tmp_path: Path) -> None:
    seen: list = []
    records = bench([small, "efficientvit_m0"], batches=[2], conditions=QUICK, on_record=seen.append)
    assert [(record.model, record.batch) for record in records] == [
        ("efficientvit(0)", 1),
        ("efficientvit(0)", 2),
        ("efficientvit_m0", 1),
        ("efficientvit_m0", 2),
    ]
    assert seen == records
    assert zoo.config_from_json(records[0].config) == small
    assert records[2].config == ""
    assert records[3].input == (2, 3, 224, 224)
    assert records[3].weight_memory > 4 * 2_300_000
    assert len({record.session for record in records}) == 1
    assert not any(record.saturating for record in records), "nothing larger was tried"
    assert records[3].command == ("zoo bench efficientvit_m0 --batch 2 --device cpu --threads 1 --clock cpu --rounds 2")
    assert read_records(tmp_path / "records.jsonl") == records


def test_engines_of_zoo_optimize_are_backends(small: zoo.ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []

    def run(model: torch.nn.Module, example: tuple, job: Job) -> Callable:
        made = run_in_engine(model, example, job)
        with torch.no_grad():
            answers.append((made(*example)[0], model(*example)))
        return made

    monkeypatch.setattr(module, "run_in_engine", run)
    conditions = dataclasses.replace(QUICK, backend="openvino")
    (record,) = bench(small.override(img_size=32), conditions=conditions, save=False)
    assert (record.backend, record.memory_format, record.batch) == ("openvino, fused", "the engine's own", 1)
    assert "--backend openvino" in record.command
    torch.testing.assert_close(*answers[0], atol=1e-5, rtol=1e-4)


def test_the_saturating_batch_is_the_smallest_that_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 1.2, 4: 1.6, 8: 3.1, 16: 6.1, 32: 12.0}  # from 4 on, twice the work takes twice the time
    monkeypatch.setattr(module, "SLOW", 100.0)
    monkeypatch.setattr(module, "_fastest", lambda call, device: call())
    tried: list[int] = []

    def prepare(batch: int) -> Callable[[], float]:
        tried.append(batch)
        return lambda: seconds[batch]

    assert saturating_batch(prepare) == (4, True)
    assert tried == [1, 2, 4, 8, 16]
    assert saturating_batch(prepare, at_most=2) == (2, False), "a batch of 4 was not tried, and would give more"
    monkeypatch.setattr(module, "SLOW", 1.5)
    assert saturating_batch(prepare) == (4, False), "nothing after a slow call"
    monkeypatch.setattr(module, "SLOW", 100.0)

    def fails_at(limit: int) -> Callable[[int], Callable[[], float]]:
        def prepare(batch: int) -> Callable[[], float]:
            if batch >= limit:
                raise RuntimeError("too large")
            return lambda: seconds[batch]

        return prepare

    assert saturating_batch(fails_at(4)) == (2, False)
    with pytest.raises(RuntimeError, match="too large"):
        saturating_batch(fails_at(1))


def test_a_group_that_does_not_fit_is_measured_one_by_one(
    small: zoo.ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_of = module._bench_group

    def at_most_one(named: list, *args: object) -> list:
        if len(named) > 1:
            raise torch.OutOfMemoryError("of a GPU")
        return group_of(named, *args)

    monkeypatch.setattr(module, "_bench_group", at_most_one)
    records = bench([small, small.override(img_size=32)], conditions=QUICK, save=False)
    assert [record.input[-1] for record in records] == [small.input_hw[1], 32]
    assert records[0].session != records[1].session


def test_a_gpu_is_given_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the kernels takes longer there than small batches do."""
    monkeypatch.setattr(module, "SLOW", 2.0)
    monkeypatch.setattr(module, "_fastest", lambda call, device: max(8e-3, 1e-5 * call()))
    for device, expected in (("cpu", (1024, False)), ("cuda", (1024, True))):
        assert saturating_batch(lambda batch: lambda: batch, device) == expected


def test_saved_records_replace_those_of_the_same_figure(small: zoo.ModelConfig, tmp_path: Path) -> None:
    first, again = (bench(small, conditions=QUICK, save=False) for _ in range(2))
    path = tmp_path / "x.jsonl"
    save_records(first, path)
    save_records(again, path)
    assert read_records(path) == again
    assert key(first[0]) == key(again[0])


def test_a_record_that_is_none_is_refused_with_its_line(small: zoo.ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    save_records(bench(small, conditions=QUICK, save=False), path)
    good = path.read_text()
    values = json.loads(good)
    for change, message in (
        ({"latency_ms": "fast"}, "line 1: latency_ms is 'fast'"),
        ({"latency_ms": -1.0}, "latency_ms is -1.0"),
        ({"latencyms": 1.0}, "unknown field 'latencyms'. Did you mean: latency_ms"),
    ):
        path.write_text(json.dumps(values | change) + "\n")
        with pytest.raises(zoo.DataError, match=message):
            read_records(path)
    del values["batch"]
    path.write_text(json.dumps(values) + "\n")
    with pytest.raises(zoo.DataError, match="the field 'batch' is missing"):
        read_records(path)
    path.write_text(good + "{\n")
    with pytest.raises(zoo.DataError, match="line 2 is no record"):
        read_records(path)


def test_csv_has_a_column_for_each_field(small: zoo.ModelConfig) -> None:
    records = bench(small, conditions=QUICK, save=False)
    row = next(csv.DictReader(as_csv(records).splitlines()))
    assert float(row["latency_ms"]) == records[0].latency_ms
    assert row["input"] == "1 3 64 64"


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "efficientvit_m0", "--threads", "1", "--clock", "cpu", "--rounds", "1", "--no-save"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--csv", str(tmp_path / "out.csv")])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "efficientvit_m0" in shown
    assert "1 threads, eager, fused, fp32, cpu time" in shown
    assert (tmp_path / "out.csv").read_text().startswith("model,")
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)[0]["model"] == "efficientvit_m0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_model"], "Unknown model"),
        (["nothing*"], "No model matches"),
        (["efficientvit_m0", "--batch", "1,x"], "expected whole numbers"),
        (["efficientvit_m0", "--batch", "0"], "expected at least 1"),
        (["efficientvit_m0", "--precision", "fp23"], "precision is 'fp23'"),
        (["efficientvit_m0", "--device", "tpu9"], "cannot be used here"),
        (["efficientvit_m0", "--backend", "openvin"], "Did you mean: openvino"),
        (["efficientvit_m0", "--backend", "onnxruntime", "--precision", "bf16"], "onnxruntime has no bf16 kernels"),
        (["matmulfree_2m", "--backend", "openvino", "--six-metrics"], "expected eager or compile"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wildcards_and_the_local_file() -> None:
    assert [name for name, _ in resolve(["efficientvit_m[01]", "tinynet_e"])] == [
        "efficientvit_m0",
        "efficientvit_m1",
        "tinynet_e",
    ]
    assert local_records().name == "records.jsonl"
