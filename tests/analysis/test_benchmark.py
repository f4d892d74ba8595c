"""The measuring harness on a clock of its own: what it counts, in which order, and when it refuses a figure."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import zoo
from zoo.analysis import benchmark
from zoo.analysis.benchmark import Ratio, Timing, compare, measure, passport, weight_bytes, working_memory


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setitem(benchmark.CLOCKS, "wall", lambda: self.now)

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes the given times, one after the other, and the last one from then on."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            self.log.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_medians_and_quartiles_of_what_the_clock_says(clock: Clock) -> None:
    timings = measure({"a": clock.call("a", 0.2), "b": clock.call("b", 0.5)}, rounds=5, turn_s=0.1)
    assert timings["a"].median == pytest.approx(0.2)
    assert timings["b"].quartiles == (pytest.approx(0.5), pytest.approx(0.5))
    assert timings["b"].spread == pytest.approx(0, abs=1e-9)
    assert len(timings["a"].rounds) == 5
    ratio = compare(timings["a"], timings["b"])
    assert str(ratio) == "2.50 (2.50 to 2.50)"


def test_candidates_take_turns(clock: Clock) -> None:
    measure({"a": clock.call("a", 1.0), "b": clock.call("b", 1.0)}, rounds=3, turn_s=0.1)
    turns = [name for name, _ in itertools.groupby(clock.log)]
    assert turns == ["a", "b"] + ["a", "b"] * 3  # the warm-up of each, then the rounds


def test_a_warm_up_lasts_until_times_settle(clock: Clock) -> None:
    slow_start = clock.call("a", 1.0, 0.5, 0.3, 0.2)
    timing = measure({"a": slow_start}, rounds=2, turn_s=0.1)["a"]
    assert timing.settled
    assert timing.times == (pytest.approx(0.2),) * 2
    restless = clock.call("b", *[2.0**-i for i in range(200)])
    assert not measure({"b": restless}, rounds=1, turn_s=1e-9, warmup_s=1e-9)["b"].settled


def timing(*rounds: float) -> Timing:
    return Timing(rounds=rounds, times=rounds, warmup_calls=1, settled=True)


def test_a_comparison_that_its_spread_swamps_is_refused() -> None:
    steady = compare(timing(1.0, 1.0, 1.0, 1.0), timing(1.2, 1.21, 1.2, 1.19))
    assert not steady.swamped
    assert str(steady).startswith("1.20 (")
    noisy = compare(timing(1.0, 1.0, 1.0, 1.0), timing(0.8, 1.4, 1.0, 1.3))
    assert noisy.swamped
    assert str(noisy).startswith("no difference measured (")
    assert Ratio(2.0, 1.2, 3.5).swamped  # the direction is clear, the figure is not
    # What disturbs a round disturbs both: 9 ms and 12 ms in one, 90 and 120 in another, are one ratio.
    assert not compare(timing(9, 90, 30), timing(12, 120, 40)).swamped


def test_only_what_took_turns_is_compared(clock: Clock) -> None:
    one, other = (measure({"a": clock.call("a", 0.1)}, rounds=2)["a"] for _ in range(2))
    with pytest.raises(zoo.ConfigError, match="not measured in turns"):
        compare(one, other)


def test_percentiles_are_of_single_calls() -> None:
    times = tuple(float(i) for i in range(100))
    values = Timing(rounds=(1.0,), times=times, warmup_calls=1, settled=True)
    assert (values.percentile(50), values.percentile(99), values.percentile(100)) == (50, 99, 99)


def test_real_calls_and_threads() -> None:
    seen = set()
    before = torch.get_num_threads()
    timing = measure({"sum": lambda: seen.add(torch.get_num_threads())}, threads=2, rounds=2, turn_s=0.001)["sum"]
    assert seen == {2}
    assert torch.get_num_threads() == before
    assert 0 < timing.median < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cud"}, "Device 'cud' cannot be used here"),
        ({"clock": "sun"}, "clock is 'sun'; expected wall or cpu"),
        ({"rounds": 0}, "expected at least 1"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        measure({"a": lambda: None}, **arguments)


def test_working_memory_is_what_a_call_adds() -> None:
    size = 64 * 2**20
    rise = working_memory(lambda: torch.ones(size, dtype=torch.uint8))
    if rise is None:
        pytest.skip("the system does not say how much memory a process has at its peak")
    assert 0.9 * size < rise < 1.2 * size
    assert working_memory(lambda: None) < size / 8


def test_weight_bytes_counts_shared_weights_once_and_buffers() -> None:
    a, b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False).half()
    b.weight = a.weight
    assert weight_bytes(nn.Sequential(a, b, nn.BatchNorm1d(4))) == 4 * 12 + 4 * 16 + 8


def test_a_passport_is_flat_json_and_says_where() -> None:
    record = passport(
        timing(0.010, 0.012, 0.011),
        device="cpu",
        batch=4,
        threads=1,
        model="efficientvit_m0",
        input=(4, 3, 224, 224),
        command="zoo bench efficientvit_m0",
        weight_memory=8,
    )
    values = json.loads(json.dumps(asdict(record)))
    assert values["latency_ms"] == pytest.approx(11)
    assert values["samples_per_s"] == pytest.approx(4 / 0.011)
    assert values["machine"] == benchmark.machine()["id"]
    assert all(isinstance(value, str | int | float | None | list) for value in values.values())
    assert record.peak_memory is None  # the working memory was not measured
    for text in (value for value in values.values() if isinstance(value, str)):
        assert not text.startswith("/")


@pytest.mark.gpu
def test_cuda_events_measure_the_device_not_the_launch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}
    timings = measure(calls, device="cuda", rounds=5)
    assert compare(timings["one"], timings["four"]).median > 2  # launches alone would take about as long
    assert working_memory(lambda: x @ x, "cuda") >= x.numel() * 4


def test_the_version_of_an_engine_is_recorded() -> None:
    known = benchmark.versions("onnxruntime")
    assert "onnxruntime 1." in known
    assert benchmark.versions("onnxruntime, fused") == known
    assert benchmark.versions("eager, fused") == benchmark.versions()


class SecondGpu:
    """Stands for torch.cuda on a machine with two GPUs, and notes which was the current one at each call."""

    def __init__(self) -> None:
        self.index, self.seen, self.now = 0, [], 0.0

    @contextlib.contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        before, self.index = self.index, place.index
        yield
        self.index = before

    def noting(self, result: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen.append(self.index)
            self.now += 0.1
            return result

        return call

    def event(self, **options: Any) -> Any:
        return mock.Mock(record=self.noting(), synchronize=self.noting(), elapsed_time=lambda end: 100.0)


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> SecondGpu:
    fake = SecondGpu()
    monkeypatch.setattr(benchmark, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, fake.noting(0))
    return fake


def test_another_gpu_is_the_current_one_while_it_is_measured(second_gpu: SecondGpu) -> None:
    measure({"one": second_gpu.noting()}, device="cuda:1", rounds=1)
    working_memory(second_gpu.noting(), "cuda:1")
    assert set(second_gpu.seen) == {1}
    assert second_gpu.index == 0


def test_another_gpu_is_the_current_one_while_it_is_recorded(
    second_gpu: SecondGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.deploy.cuda_graph import record

    contexts = {name: lambda *args, **options: contextlib.nullcontext() for name in ("stream", "graph")}
    streams = {name: second_gpu.noting(mock.Mock()) for name in ("Stream", "current_stream", "CUDAGraph")}
    for name, fake in {**contexts, **streams}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record(second_gpu.noting(), torch.device("cuda:1"))
    assert set(second_gpu.seen) == {1}
