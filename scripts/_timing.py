"""What the benchmarks share: timing things in turns, so that all of them see the same machine."""

import gc
import statistics
from collections.abc import Callable, Mapping


def in_turns(rounds: int, timers: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """``rounds`` samples of each timer in turn, after one of each that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds + 1):
        for name, timer in timers.items():
            gc.collect()
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


def spread(samples: list[float]) -> float:
    """The distance between the quartiles, in percent of the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return 100 * (high - low) / middle
