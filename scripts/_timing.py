"""What the benchmarks share: timing things in turns, so that all of them see the same machine."""

import gc
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
