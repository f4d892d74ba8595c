"""How long zoo.scale takes to meet a MACs target, for the lightest and the heaviest model of every family.

python scripts/benchmark_scaling.py [--rounds 3] [MODEL ...]

Each model has processes of its own, in which torch and timm are imported before the clock starts:

* first: the first call, twice the MACs by the rule "fast" ("dw" for language models), in the median of the rounds;
* imports: what of zoo it imports on its way, on top of that;
* worst: the slowest of all rules that the family can follow, for half, twice and four times the MACs, with nothing
  remembered, and which it was.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

FACTORS = (0.5, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of each family the lightest and the heaviest by default")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each model")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process is started with
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one)))
        return
    print(f"{'model':24} {'first':>6} {'imports':>8} {'worst':>6}   (milliseconds)")
    for name in arguments.models or ends_of_each_family():
        command = [sys.executable, __file__, "--one", name]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(arguments.rounds)
        ]
        first, imports = (statistics.median(each[key] for each in found) for key in ("first", "imports"))
        worst = min((each["worst"] for each in found), key=lambda each: each[0])  # the least disturbed round's
        what = f"{worst[1]} x {worst[2]:g}, error {worst[3]:+.1%}"
        print(f"{name:24} {first:6.0f} {imports:8.0f} {worst[0]:6.0f}   {what}", flush=True)


def ends_of_each_family() -> list[str]:
    from zoo.registry import index

    names: list[str] = []
    families: dict[str, list[str]] = {}
    for name in sorted(index(), key=lambda name: index()[name]["macs"]):
        families.setdefault(index()[name]["family"], []).append(name)
    for family in sorted(families):
        names += dict.fromkeys([families[family][0], families[family][-1]])
    return names


def measured(name: str) -> dict[str, Any]:
    """In a process that has done nothing yet."""
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    import zoo
    from zoo.analysis import shapes
    from zoo.registry import family_of
    from zoo.scaling import counts_of, fit, rules_for

    base = zoo.get_config(name)
    family_of(base)
    imported = time.perf_counter()
    fit(name, "fast" if "fast" in rules_for(base) else "dw", flops=2.0)
    first = time.perf_counter()
    worst: tuple[float, str, float, float] = (0.0, "", 0.0, 0.0)
    for rule in rules_for(base):
        for flops in FACTORS:
            counts_of.cache_clear()
            shapes.forget()
            gc.collect()  # of what was forgotten
            begin = time.perf_counter()
            try:
                found = fit(name, rule, flops=flops)
            except zoo.ConfigError:  # smaller than the rule makes it, or larger
                continue
            worst = max(worst, (1e3 * (time.perf_counter() - begin), rule, flops, found.error))
    return {"imports": 1e3 * (imported - start), "first": 1e3 * (first - imported), "worst": worst}


if __name__ == "__main__":
    main()
