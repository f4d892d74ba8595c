"""The one way in which zoo measures speed: torch.utils.benchmark on CPUs, CUDA events on GPUs.

    timings = measure({"eager": call, "compiled": other}, device="cpu", threads=2)
    print(compare(timings["compiled"], timings["eager"]))       # "1.31 (1.29 to 1.33)", or why there is no figure

What is compared takes turns, so that all of it sees the same machine, after a warm-up that lasts until times have
settled. Figures are medians with quartiles. A figure that is kept is a :class:`Passport`: one flat JSON record with all
that the figure depends on and the command that measures it again.
"""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ConfigError, nearest
from zoo.factory import check_device
from zoo.ops._extension import without_cuda_warning

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SETTLED = 0.05  # relative difference of two turns from which on a warm-up is over


@dataclass(frozen=True)
class Timing:
    """How long a call takes, in seconds."""

    rounds: tuple[float, ...]  # of each round, the median of its turn
    times: tuple[float, ...]  # of every call that was timed; of very short ones, means of several
    warmup_calls: int
    settled: bool  # whether two turns of the warm-up agreed within 5 % before its time was over
    session: str = ""  # the same for all that took turns

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return _quartiles(self.rounds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, in percent of the median."""
        low, high = self.quartiles
        return 100 * (high - low) / self.median

    def percentile(self, percent: float) -> float:
        """The time within which this many percent of all timed calls ended."""
        ranked = sorted(self.times)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


@dataclass(frozen=True)
class Ratio:
    """By how much one call is faster than another, from the rounds that both took part in."""

    median: float
    low: float  # quartiles of the ratios of single rounds
    high: float

    @property
    def swamped(self) -> bool:
        """Whether the quartiles are as far from each other as the ratio is from 1, or further: there is no figure."""
        return abs(log(self.median)) <= log(self.high / self.low)

    def __str__(self) -> str:
        if self.swamped:
            return f"no difference measured ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


# Before a turn: threads of the runtime that had the last one (onnxruntime's) go on looking for work about that long, on
# the cores that this one needs.
REST_S = 0.06


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    clock: str = "wall",
    rounds: int = 9,
    turn_s: float = 0.1,
    warmup_s: float = 3.0,
) -> dict[str, Timing]:
    """Time calls in turns: each is warmed up, then every round gives each of them a turn of at least one call.

    Between turns there is a short rest, so that threads of the call before are asleep.

    A call is timed as it is: bring your own ``torch.inference_mode()``. Its inputs stay in the caches from one call to
    the next, as they do in a service that has just decoded them.

    Args:
        calls: What to time, by name.
        device: Where they compute. On a GPU a call's time is between two events on its current stream; on other
            accelerators it ends with a synchronisation.
        threads: Of torch's operators on the CPU; as they are set by default. Other engines have their own.
        clock: ``"wall"``, or ``"cpu"`` for the process's time on all cores, which other processes disturb less.
        rounds: How many.
        turn_s: Seconds of a turn; calls are repeated to fill it.
        warmup_s: The most seconds to warm one call up; 0 for none, of what has just been called.

    Raises:
        ConfigError: If the device cannot be used, or a number is out of range.
    """
    check_device(device)
    place = torch.device(device)
    if clock not in CLOCKS:
        raise ConfigError(f"clock is {clock!r}; expected {' or '.join(CLOCKS)}.{nearest(clock, CLOCKS)}")
    if clock == "cpu" and place.type != "cpu":
        raise ConfigError(f"clock is 'cpu', and the device {str(place)!r}; expected 'wall'.")
    if rounds < 1 or (threads is not None and threads < 1):
        raise ConfigError(f"rounds is {rounds} and threads {threads}; expected at least 1.")
    turns = {name: _turn(call, place, threads or torch.get_num_threads(), clock) for name, call in calls.items()}
    warm = {name: _warm_up(turn, turn_s, warmup_s) for name, turn in turns.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in turns}
    session = secrets.token_hex(4)
    with old_objects_kept():
        for _ in range(rounds):
            for name, turn in turns.items():
                gc.collect()
                if len(turns) > 1:
                    time.sleep(REST_S)
                times[name].append(turn(turn_s))
    return {
        name: Timing(
            rounds=tuple(map(statistics.median, of_rounds)),
            times=tuple(seconds for turn_times in of_rounds for seconds in turn_times),
            warmup_calls=warm[name][0],
            settled=warm[name][1],
            session=session,
        )
        for name, of_rounds in times.items()
    }


@contextlib.contextmanager
def old_objects_kept() -> Iterator[None]:
    """A block in which collecting garbage looks at new objects alone: torch's take a third of a second."""
    if gc.get_freeze_count():  # the caller does so himself
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def compare(ours: "Timing | Passport", theirs: "Timing | Passport") -> Ratio:
    """By how much ``ours`` is faster than ``theirs``; both from one call of :func:`measure`.

    Raises:
        ConfigError: If they did not take turns: what else differed between them is not known.
    """
    if ours.session != theirs.session:
        raise ConfigError("The two were not measured in turns, so that they cannot be compared; measure them together.")
    pairs = zip(_rounds(ours), _rounds(theirs), strict=True)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in pairs]
    return Ratio(statistics.median(ratios), *_quartiles(ratios))


def _rounds(measured: "Timing | Passport") -> tuple[float, ...]:
    return measured.rounds if isinstance(measured, Timing) else measured.rounds_ms


def _quartiles(values: "list[float] | tuple[float, ...]") -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _turn(call: Callable[[], object], device: torch.device, threads: int, clock: str) -> Callable[[float], list[float]]:
    """A function that calls for so many seconds, at least once, and returns the seconds of each call."""
    if device.type == "cuda":
        return lambda seconds: _cuda_turn(call, device, seconds)

    def synchronised() -> None:
        call()
        torch.accelerator.synchronize(device)

    once = call if device.type == "cpu" else synchronised
    with without_cuda_warning():  # torch's Timer imports its extension builder
        from torch.utils.benchmark import Timer
    # The Timer switches garbage collection off, and repeats a call that is too short for the clock.
    timer = Timer("once()", globals={"once": once}, timer=CLOCKS[clock], num_threads=threads)

    def turn(seconds: float) -> list[float]:
        with torch_threads(threads):
            start = CLOCKS[clock]()
            once()
            took = CLOCKS[clock]() - start
        # The Timer would call once more, to see how often it has to.
        return [took] if took >= seconds else timer.blocked_autorange(min_run_time=seconds).times

    return turn


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """``torch.set_num_threads(count)`` for the time of a block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_current(device: str | torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which a GPU is the current one, whose streams, events and statistics are meant; nothing for others."""
    place = torch.device(device)
    return torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()


def _cuda_turn(call: Callable[[], object], device: torch.device, at_least: float) -> list[float]:
    times: list[float] = []
    with as_current(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        while sum(times) < at_least:
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return times


def _warm_up(turn: Callable[[float], list[float]], turn_s: float, at_most: float) -> tuple[int, bool]:
    """Take turns until two in a row agree; how many calls that took, and whether they did."""
    if not at_most:
        return 0, False
    start, calls, before = time.perf_counter(), 0, 0.0
    while True:
        times = turn(turn_s)
        calls, now = calls + len(times), statistics.median(times)
        if abs(now - before) <= SETTLED * now:
            return calls, True
        if time.perf_counter() - start > at_most:
            return calls, False
        before = now


def memory_in_use(device: str | torch.device = "cpu") -> int | None:
    """Bytes held now: on CUDA what torch's allocator gave, on CPUs the process's resident memory; None if not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    known = torch.device(device).type == "cpu" and Path("/proc/self/status").is_file()
    return _status_bytes("VmRSS") if known else None


def working_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes by which a call raises the memory in use at its peak, above weights, inputs and all else held before.

    On a CPU it is the process's resident memory, which Linux alone can say: whatever the call touches is in it, an
    engine's own buffers too, if the engine does not keep them from call to call. On CUDA, what torch's allocator gave.
    None where it cannot be measured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with as_current(device):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not os.access(reset, os.W_OK):
        return None
    gc.collect()
    _release_free_memory()
    reset.write_text("5")  # the peak is now what is held
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _release_free_memory() -> None:
    """Make the C library give back what was freed, or a call would find its memory there and raise nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


@dataclass(frozen=True, kw_only=True)
class Passport:
    """A speed figure and all that it depends on; flat, so that it is a row of a table as well as a JSON object.

    Times are in milliseconds, memory in bytes. What was not measured is None.
    """

    model: str
    config: str = ""  # the model's config as JSON, where it is not that of a registered name
    batch: int
    input: tuple[int, ...]  # shape, with the batch
    saturating: bool = False  # the smallest batch of which twice gives no more throughput to speak of
    device: str
    backend: str = "eager"
    precision: str = "fp32"
    memory_format: str = "contiguous"
    threads: int
    clock: str = "wall"
    latency_ms: float  # median of the rounds
    latency_ms_q1: float
    latency_ms_q3: float
    latency_ms_p90: float  # of single calls
    latency_ms_p99: float
    samples_per_s: float  # batch / latency
    rounds_ms: tuple[float, ...]  # of each round, what the median is of
    session: str  # records of one session were measured in turns: their rounds can be compared one by one
    calls: int
    warmup_calls: int
    settled: bool
    working_memory: int | None = None  # see working_memory()
    weight_memory: int | None = None  # parameters and buffers
    machine: str  # machine()["id"]
    cpu: str
    cores: int
    cpu_capability: str
    system: str
    gpu: str | None
    driver: str | None
    versions: str  # of zoo, torch and the backend
    load: float | None  # load average of the last minute, when the measurement began
    measured_at: str  # UTC, ISO 8601
    measured_by: str = "zoo"  # who: records of others carry their name
    command: str  # measures this figure again

    @property
    def peak_memory(self) -> int | None:
        """Bytes in use at the peak of a call: weights and working memory."""
        if self.working_memory is None or self.weight_memory is None:
            return None
        return self.working_memory + self.weight_memory


def passport(timing: Timing, *, device: str, batch: int, threads: int | None = None, **facts: Any) -> Passport:
    """The record of a timing made on this machine.

    Args:
        timing: From :func:`measure`.
        device, batch, threads: As it was measured.
        facts: The other fields of :class:`Passport` that are not the machine's or the timing's: ``model``, ``input``
            and ``command``, and ``backend``, ``precision`` and so on where they differ from the defaults.
    """
    here = dict(machine())
    low, high = timing.quartiles
    return Passport(
        batch=batch,
        device=device,
        threads=threads or torch.get_num_threads(),
        latency_ms=1e3 * timing.median,
        latency_ms_q1=1e3 * low,
        latency_ms_q3=1e3 * high,
        latency_ms_p90=1e3 * timing.percentile(90),
        latency_ms_p99=1e3 * timing.percentile(99),
        samples_per_s=batch / timing.median,
        rounds_ms=tuple(1e3 * seconds for seconds in timing.rounds),
        session=timing.session,
        calls=len(timing.times),
        warmup_calls=timing.warmup_calls,
        settled=timing.settled,
        machine=here.pop("id"),
        versions=versions(facts.get("backend", "")),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **here,
        **facts,
    )


@cache
def machine() -> dict[str, Any]:
    """This machine: processor, cores, instruction set, GPU, and an ``id`` of these; system and driver."""
    cuda = torch.cuda.is_available()
    hardware = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
    digest = hashlib.sha256(repr(hardware).encode()).hexdigest()[:8]
    return {
        "id": digest,
        **hardware,
        "system": f"{platform.system()} {platform.machine()}",
        "driver": _driver() if cuda else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    """CUDA's version, and the driver's where NVIDIA's library can be asked."""
    try:
        import pynvml  # the package nvidia-ml-py

        pynvml.nvmlInit()
        return f"{pynvml.nvmlSystemGetDriverVersion()}, CUDA {torch.version.cuda}"
    except Exception:  # not installed, or it finds no driver
        return f"CUDA {torch.version.cuda}"


def versions(backend: str = "") -> str:
    """``"zoo 0.1.0, torch 2.14.1"``, and the backend's where that is an installed package.

    Args:
        backend: As a :class:`Passport` has it, such as ``"onnxruntime, fused"``.
    """
    backend = backend.partition(",")[0]
    found = [f"zoo {zoo.__version__}", f"torch {torch.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):  # not a package: a way of running torch
        found.append(f"{backend} {metadata.version(backend)}")
    return ", ".join(found)
