"""Forward passes of zoo's image models against timm's with the same weights, on this machine, side by side.

    python scripts/benchmark_vision.py [MODEL ...] [--every-variant] [--batch 1 32] [--threads 2] [--clock wall]
    python scripts/benchmark_vision.py --every-variant --part 1/6    # the same in six pieces, of about equal work

zoo's model is fused; timm's is as ``timm.create_model`` gives it, and once more in channels-last, since some of its
models are faster so. A model that timm has not is compared with zoo's own before ``fuse()``; EfficientMod also with
the authors', given ``--efficientmod models/EfficientMod.py`` of github.com/ma-xu/EfficientMod. Without arguments, the
middle variant of each family runs; with ``--every-variant``, all.

What is compared takes turns, so that it sees the same machine; figures are medians of the rounds, with the distance
between the quartiles in percent, and ratios are of medians, above 1 where zoo is faster. On a machine with other work
to do, wall time with several threads says little, since every operator waits for threads that are not running; there,
use ``--threads 1 --clock cpu``.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from _authors import authors_efficientmod
from _timing import in_turns, seconds_a_call, spread
from torch import Tensor, nn

import zoo
from zoo.registry import index

MODELS = zoo.list_models(task="image-classification")


def middle_variants() -> list[str]:
    """The variant of each family with the median MACs."""
    families: dict[str, list[str]] = {}
    for name in sorted(MODELS, key=lambda name: index()[name]["macs"]):
        families.setdefault(index()[name]["family"], []).append(name)
    return [variants[(len(variants) - 1) // 2] for _, variants in sorted(families.items())]


def part(names: list[str], piece: str) -> list[str]:
    """Every n-th model by MACs, so that the pieces take about as long as each other."""
    index_of, pieces = map(int, piece.split("/"))
    return sorted(names, key=lambda name: index()[name]["macs"])[index_of - 1 :: pieces] if pieces > 1 else names


def make_rivals(name: str, efficientmod: Path | None = None) -> dict[str, nn.Module]:
    """zoo's fused model first, then what it is compared with; all of one set of weights."""
    torch.manual_seed(0)
    plain = zoo.create_model(name).eval()
    state_dict = plain.state_dict()
    rivals = {"zoo": zoo.create_model(name).eval()}
    rivals["zoo"].load_state_dict(state_dict)
    rivals["zoo"].fuse()
    if not timm.is_model(name):
        rivals["zoo, not fused"] = plain
        if name.startswith("efficientmod") and efficientmod is not None:
            rivals["the authors'"] = authors_efficientmod(efficientmod, name, state_dict)
        return rivals
    for kind in ("timm", "timm, channels-last"):
        model = rivals[kind] = timm.create_model(name).eval()
        missing, unexpected = model.load_state_dict(state_dict, strict=False)  # timm keeps some constants in its files
        assert not unexpected
        assert not set(missing) & {key for key, _ in model.named_parameters()}
    rivals["timm, channels-last"].to(memory_format=torch.channels_last)
    return rivals


def seconds_in_turns(
    rivals: dict[str, nn.Module], images: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each rival's forward pass in each round; a quick one is repeated within its turn."""

    channels_last = images.to(memory_format=torch.channels_last)
    inputs = {kind: channels_last if "channels-last" in kind else images for kind in rivals}
    passes = {kind: partial(model, inputs[kind]) for kind, model in rivals.items()}
    timers = {kind: partial(seconds_a_call, forward, clock, at_least=0.1) for kind, forward in passes.items()}
    with torch.inference_mode():
        return in_turns(rounds, timers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the middle variant of each family by default")
    parser.add_argument("--every-variant", action="store_true")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only the I-th of N pieces of the models")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the process's time on all cores")
    parser.add_argument("--efficientmod", type=Path, help="the authors' models/EfficientMod.py")
    options = parser.parse_args()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(options.threads)

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()} {capability}", end=", ")
    print(f"{options.threads} threads, {options.clock} time, {options.rounds} rounds", end=", ")
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores\n")
    print("| model | batch | zoo (ms) | spread | against | its ms | its spread | zoo is faster by |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for name in part(options.models or (MODELS if options.every_variant else middle_variants()), options.part):
        rivals = make_rivals(name, options.efficientmod)
        for batch in options.batch:
            images = torch.randn(batch, 3, *zoo.get_config(name).input_hw)
            seconds = seconds_in_turns(rivals, images, options.rounds, clock)
            ours = statistics.median(seconds["zoo"])
            for kind in list(rivals)[1:]:
                theirs = statistics.median(seconds[kind])
                print(
                    f"| `{name}` | {batch} | {1e3 * ours:.1f} | {spread(seconds['zoo']):.0f} % | {kind} "
                    f"| {1e3 * theirs:.1f} | {spread(seconds[kind]):.0f} % | {theirs / ours:.2f} |",
                    flush=True,
                )
    print(f"\nLoad average after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
