"""How long zoo.scale takes to meet a MACs target, for a model of every family, and that no weight is allocated for it.

python scripts/benchmark_scaling.py [--rounds 5] [--clock cpu] [MODEL ...]

Every round forgets all counts, so that each call starts from nothing but the imports.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _timing import in_turns, seconds_of, spread

import zoo
from zoo.registry import index
from zoo.scaling import counts_of, fit, rules_for

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of each family the lightest by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flops", type=float, default=2.0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.models
    if not names:
        lightest: dict[str, str] = {}
        for name in sorted(zoo.list_models(), key=lambda name: index()[name]["macs"]):
            lightest.setdefault(index()[name]["family"], name)
        names = sorted(lightest.values())
    found = {}

    def call(name: str) -> float:
        counts_of.cache_clear()
        rule = "fast" if "fast" in rules_for(zoo.get_config(name)) else "dw"
        clock = CLOCKS[arguments.clock]

        def scale() -> None:
            found[name] = fit(name, rule, flops=arguments.flops)

        return seconds_of(scale, clock)

    samples = in_turns(arguments.rounds, {name: (lambda name=name: call(name)) for name in names})
    print(f"flops={arguments.flops:g}, {arguments.clock} time, {arguments.rounds} rounds, torch {torch.__version__}")
    print(f"{'model':24} {'median ms':>9} {'spread':>7}  error of the MACs")
    for name, seconds in samples.items():
        median = sorted(seconds)[len(seconds) // 2]
        print(f"{name:24} {1e3 * median:9.0f} {spread(seconds):6.0f}%  {found[name].error:+.2%}")


if __name__ == "__main__":
    main()
