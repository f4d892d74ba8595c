"""How long until there is a model: zoo against timm, side by side.

    python scripts/benchmark_startup.py [--rounds 15]

Two comparisons, each interleaved so that both sides see the same machine:

1. ``import zoo`` against ``import timm``, every time in a fresh process; the interpreter's own start is not counted.
2. ``create_model("efficientvit_m5", ...)`` from the same safetensors file, after imports, in one process with two
   threads. The file holds random weights, so nothing is downloaded.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MODEL = "efficientvit_m5"


def import_seconds(package: str) -> float:
    """Seconds that ``import package`` takes in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def call_seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes, after clearing the garbage of the one before."""
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(rounds: int, **timers: Callable[[], float]) -> dict[str, list[float]]:
    """``rounds`` samples of each timer in turn, after one of each that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds + 1):
        for name, timer in timers.items():
            seconds = timer()
            if i:
                samples[name].append(seconds)
    return samples


def report(title: str, samples: dict[str, list[float]]) -> None:
    """Print the median and the quartiles of each side in milliseconds, and the ratio of the medians."""
    print(f"\n{title}")
    for name, seconds in samples.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        print(f"  {name:<6}{middle:>9.1f} ms   (half of them {low:.1f} to {high:.1f})")
    print(f"  zoo / timm{statistics.median(samples['zoo']) / statistics.median(samples['timm']):>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each side")
    rounds = parser.parse_args().rounds

    imports = interleave(rounds, zoo=lambda: import_seconds("zoo"), timm=lambda: import_seconds("timm"))

    import timm
    import torch

    import zoo
    from zoo.atomic import save_safetensors

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{MODEL}.safetensors")
        save_safetensors(zoo.create_model(MODEL).state_dict(), file)
        creations = interleave(
            rounds,
            zoo=lambda: call_seconds(lambda: zoo.create_model(MODEL, checkpoint=file)),
            timm=lambda: call_seconds(lambda: timm.create_model(MODEL, checkpoint_path=str(file))),
        )

    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, timm {timm.__version__}, {rounds} rounds"
    )
    report("import", imports)
    report(f"create_model({MODEL!r}) from a file", creations)


if __name__ == "__main__":
    main()
