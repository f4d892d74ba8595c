"""How long ``import zoo`` takes against ``import timm``.

    python scripts/benchmark_startup.py [--rounds 15]

Every time in a fresh process, in turns, so that both sides see the same machine; the interpreter's own start is not
counted. ``benchmark_weights.py`` goes on from there, to models with weights.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

from _timing import in_turns


def import_seconds(package: str) -> float:
    """Seconds that ``import package`` takes in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


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

    imports = in_turns(rounds, {"zoo": lambda: import_seconds("zoo"), "timm": lambda: import_seconds("timm")})

    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}, "
        f"timm {version('timm')}, {rounds} rounds"
    )
    report("import", imports)


if __name__ == "__main__":
    main()
