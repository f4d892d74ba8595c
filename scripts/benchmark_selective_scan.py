"""The selective scan's implementations against the step-by-step reference, and EfficientVMamba-T on each, side by side.

    python scripts/benchmark_selective_scan.py [--device cpu] [--threads 2] [--rounds 7] [--clock wall]

The sizes are those of EfficientVMamba-T's largest stage: batch 1, 4 groups of 96 channels, 16 states. What is compared
is interleaved, so that all of it sees the same machine; the figures are medians of the rounds, with the distance
between the quartiles in percent. On a machine with other work to do, wall time with several threads says little: small
operators wait for threads that are not running, which the reference suffers from most. There, use
``--threads 1 --clock cpu``.

Memory is a fresh process's peak above what it held before, outputs included, as a multiple of inputs and outputs.

Tables are printed as Markdown.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _timing import in_turns, seconds_a_call, spread

import zoo
from zoo.ops import selective_scan
from zoo.ops.selective_scan import choose

LENGTHS = (3136, 196, 49)
CHANNELS, STATES, GROUPS = 384, 16, 4
VARIABLE = "ZOO_SELECTIVE_SCAN"


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Make an implementation the one that runs."""
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def make_inputs(length: int, device: str, requires_grad: bool) -> dict[str, torch.Tensor]:
    """Inputs as Mamba's layers make them: A is -1 to -N, and step sizes are small."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "u": (1, CHANNELS, length),
        "delta": (1, CHANNELS, length),
        "B": (1, GROUPS, STATES, length),
        "C": (1, GROUPS, STATES, length),
        "D": (CHANNELS,),
        "delta_bias": (CHANNELS,),
    }
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors["A"] = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    tensors["delta_bias"] -= 4
    return {name: x.to(device).requires_grad_(requires_grad) for name, x in tensors.items()}


def make_call(name: str, length: int, device: str, *, backward: bool) -> Callable[[], Any]:
    """A call of the scan by implementation ``name``, with its gradients if asked."""
    inputs = make_inputs(length, device, backward)
    grad = torch.randn(1, CHANNELS, length, device=device)

    def call() -> Any:
        with forced(name), torch.set_grad_enabled(backward):
            y = selective_scan(**inputs, delta_softplus=True)
            result = torch.autograd.grad(y, list(inputs.values()), grad) if backward else y
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; a quick call is repeated within its turn."""
    timers = {name: partial(seconds_a_call, call, clock, at_least=0.05) for name, call in calls.items()}
    return {name: [1e3 * seconds for seconds in turns] for name, turns in in_turns(rounds, timers).items()}


def show(milliseconds: list[float]) -> str:
    return f"{median(milliseconds):.3g} ms ({spread(milliseconds):.0f} %)"


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def peak_memory_ratio(name: str, device: str, *, backward: bool) -> str:
    """Peak memory of a call at length 3136 above what was held before, over the bytes of inputs and outputs."""
    moved = bytes_moved(LENGTHS[0], backward=backward)
    if device == "cuda":
        call = make_call(name, LENGTHS[0], device, backward=backward)
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return f"{(torch.cuda.max_memory_allocated() - before) / moved:.2f}"
    if not Path("/proc/self/clear_refs").exists():
        return "not measured"
    # A process of its own, where large blocks come from the system and go back to it, not from what was freed before.
    command = [sys.executable, __file__, "--peak", name, "backward" if backward else "forward"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return f"{int(done.stdout.split()[-1]) / moved:.2f}"


def print_peak(name: str, *, backward: bool) -> None:
    """Print by how many bytes a call at length 3136 raises this process's peak."""
    make_call(name, 64, "cpu", backward=backward)()
    call = make_call(name, LENGTHS[0], "cpu", backward=backward)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is held
    result = call()
    print(_status("VmHWM") - before)
    del result


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bytes_moved(length: int, *, backward: bool) -> int:
    """Bytes of inputs and outputs; with the backward pass, of the outputs' and inputs' gradients too."""
    inputs = sum(x.numel() * 4 for x in make_inputs(length, "cpu", False).values())
    output = 4 * CHANNELS * length
    return (inputs + output) * (2 if backward else 1)


def benchmark_op(names: list[str], device: str, rounds: int, clock: Callable[[], float]) -> None:
    for backward in (False, True):
        title = "forward + backward" if backward else "forward"
        header(f"{title}, {device}", *[f"L = {length}" for length in LENGTHS], "2L / L at 3136", "memory at 3136")
        columns = []
        for length in LENGTHS:
            calls = {name: make_call(name, length, device, backward=backward) for name in names}
            columns.append(interleaved(calls, rounds, clock))
        for name in names:
            cells = []
            for times in columns:
                ratio = median(times["ref"]) / median(times[name])
                cells.append(show(times[name]) + ("" if name == "ref" else f", x {ratio:.1f}"))
            if name == "ref":
                row(name, *cells, "", "")
                continue
            one, two = (make_call(name, length, device, backward=backward) for length in (3136, 6272))
            pair = interleaved({"one": one, "two": two}, 3 * rounds, clock)  # near 2: a small difference to see
            memory = peak_memory_ratio(name, device, backward=backward)
            row(name, *cells, f"{median(pair['two']) / median(pair['one']):.2f}", memory)


def benchmark_model(names: list[str], rounds: int, clock: Callable[[], float]) -> None:
    image = torch.randn(1, 3, 224, 224)
    calls: dict[str, Callable[[], Any]] = {}
    for model_name in ("efficientvmamba_t", "efficientvit_m5"):
        plain, fused = (zoo.create_model(model_name).eval() for _ in range(2))
        for kind, model in (("", plain), (", fused", fused.fuse())):
            for name in names if model_name == "efficientvmamba_t" else ["cpu"]:

                def call(model: torch.nn.Module = model, name: str = name) -> Any:
                    with forced(name), torch.no_grad():
                        return model(image)

                label = f"{model_name}{kind}"
                calls[f"{label}, scan {name}" if model_name == "efficientvmamba_t" else label] = call
    times = interleaved(calls, rounds, clock)
    header("whole model, forward, batch 1, 224 px", "time", "against scan ref", "against efficientvit_m5")
    for label, milliseconds in times.items():
        fused = ", fused" if ", fused" in label else ""
        against_m5 = f"{median(milliseconds) / median(times['efficientvit_m5' + fused]):.2f}"
        reference = times.get(f"efficientvmamba_t{fused}, scan ref")
        against_ref = f"x {median(reference) / median(milliseconds):.1f}" if reference and "mamba" in label else ""
        row(label, show(milliseconds), against_ref, against_m5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the process's time on all cores")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "PASS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], backward=options.peak[1] == "backward")
        return
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(options.threads)

    chosen = choose(torch.device(options.device))
    if options.device == "cuda":
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        print(f"The default is {chosen.name}: {chosen.reason}")
        mamba = ["mamba"] if chosen.name == "mamba" else []
        benchmark_op(["ref", "triton", *mamba], "cuda", options.rounds, clock)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{options.threads} threads, {options.clock} time")
    print(f"Load average before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print(f"The default is {chosen.name}: {chosen.reason}")
    benchmark_op(["ref", "cpu", "torch"], "cpu", options.rounds, clock)
    benchmark_model(["ref", "cpu", "torch"], options.rounds, clock)
    print()
    print(f"Load average after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
