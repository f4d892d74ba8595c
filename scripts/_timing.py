"""What the benchmarks share: timing things in turns, so that all of them see the same machine."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from zoo.analysis.benchmark import REST_S, old_objects_kept
from zoo.deploy.cuda_graph import record


def in_turns(rounds: int, timers: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """``rounds`` samples of each timer in turn, after one of each that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    with old_objects_kept():
        for i in range(rounds + 1):
            for name, timer in timers.items():
                gc.collect()
                time.sleep(REST_S)
                seconds = timer()
                if i:
                    samples[name].append(seconds)
    return samples


def seconds_of(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    start = clock()
    call()
    return clock() - start


def seconds_a_call(call: Callable[[], object], clock: Callable[[], float], at_least: float) -> float:
    """Mean seconds of a call that is repeated until ``at_least`` seconds have passed."""
    start, calls = clock(), 0
    while calls == 0 or clock() - start < at_least:
        call()
        calls += 1
    return (clock() - start) / calls


def replayed(call: Callable[[], object], calls: int, at_least: float) -> Callable[[], float]:
    """A timer of a call on a GPU: the mean of ``calls`` of them recorded as a CUDA graph, which is replayed.

    So the processor's time to start kernels one by one is left out.
    """

    def all_calls() -> None:
        for _ in range(calls):
            call()

    graph = record(all_calls, warmup=1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        seconds, replays = 0.0, 0
        while seconds < at_least:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
            replays += 1
        return seconds / (replays * calls)

    return run


def spread(samples: list[float]) -> float:
    """The distance between the quartiles, in percent of the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return 100 * (high - low) / middle
