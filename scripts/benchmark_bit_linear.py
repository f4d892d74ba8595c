"""Packed BitLinear against torch's linear layers, the gated recurrence against a loop over steps, and training memory.

    python scripts/benchmark_bit_linear.py [--device cpu] [--threads 2] [--rounds 7] [--only products scan memory]

Products are those of the released MatMul-free LMs' MLPs. What is compared is interleaved, so that all of it sees the
same machine; the figures are medians of the rounds, with the distance between the quartiles in percent. A layer is
either called again and again, so that its weights stay in cache, or in turn with copies of itself that are together
larger than any cache, as in a model. The bandwidth is that of adding up as much memory with the same threads, in
the same turns; the share of it is what the packed bytes over the time come to.

Memory is a fresh process's peak above what it held before, in a training step of one layer, or of a block with its
six: forward, backward, and the gradients that they leave. Unfused are the same layers written in PyTorch's operators,
as the reference is.

On a GPU (``--device cuda``) products are replayed as CUDA graphs, which leaves out what starting a kernel costs the
processor, and memory is that of PyTorch's allocator. The recurrence runs there as it is called.

Tables are printed as Markdown.
"""

import argparse
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _timing import in_turns, replayed, seconds_a_call, spread

import zoo
from zoo.models.matmulfree import MatMulFreeBlock
from zoo.ops import bit_linear, hgrn_scan, packed_bit_linear
from zoo.ops.bit_linear import choose, pack_weight
from zoo.ops.hgrn_scan import hgrn_scan_reference

SHAPES = ((1024, 2816), (2048, 5632), (2560, 6912))
BATCHES = (1, 32, 512)
LENGTH, WIDTH = 2048, 1024
MEMORY_SHAPES = ((1024, 1024), (5632, 1024), (1024, 2816))  # [Cout, Cin] in the 370M model
MEMORY_TOKENS = (2048, 8192)
FORMS = ("unfused", "fused")
MODEL, BLOCK_TOKENS = "matmulfree_370m", (2048, 4096)


def beyond_caches(device: str | torch.device) -> int:
    """Bytes that no cache holds: on a CPU twice the largest that Linux names, and 128 MB at least."""
    if torch.device(device).type != "cpu":
        return 128 * 2**20
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([128 * 2**20, *(2 * int(size[:-1]) * 2**10 for size in sizes if size.endswith("K"))])


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def show(seconds: list[float]) -> str:
    return f"{1e6 * median(seconds):.4g} us ({spread(seconds):.0f} %)"


def measured(
    calls: dict[str, Callable[[], Any]], rounds: int, replays: int = 0, at_least: float = 0.03
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a quick call is repeated within its turn, or replayed as a CUDA graph."""
    if replays:
        return in_turns(rounds, {name: replayed(call, replays, at_least) for name, call in calls.items()})
    return in_turns(rounds, {k: partial(seconds_a_call, f, time.perf_counter, at_least) for k, f in calls.items()})


def copies(tensor: torch.Tensor, cached: bool) -> Callable[[], torch.Tensor]:
    """The tensor, or in turn copies of it that no cache holds."""
    count = 1 if cached else -(-beyond_caches(tensor.device) // tensor.nbytes)
    return partial(next, itertools.cycle([tensor, *(tensor.clone() for _ in range(count - 1))]))


def benchmark_products(rounds: int, device: str) -> None:
    block = torch.ones(beyond_caches(device) // 4, device=device)
    columns_of_speed = ("packed GB/s", "memory GB/s", "share")
    header("out x in, batch", "weights", "packed", "float32", "bfloat16", "x float32", "x bfloat16", *columns_of_speed)
    for (rows, columns), batch in itertools.product(SHAPES, BATCHES):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, columns, generator=generator).to(device)
        weight = 0.02 * torch.randn(rows, columns, generator=generator).to(device)
        packed, scale = pack_weight(weight)
        norm_weight = torch.ones(columns, device=device)
        for cached in (True, False) if batch == 1 else (True,):
            half, half_weight = x.bfloat16(), copies(weight.bfloat16(), cached)
            full_weight, packed_weight = copies(weight, cached), copies(packed, cached)

            def run_packed(
                x: Any = x, get: Any = packed_weight, scale: Any = scale, norm: Any = norm_weight, rows: int = rows
            ) -> Any:
                return packed_bit_linear(x, get(), scale, norm, out_features=rows)

            times = measured(
                {
                    "packed": run_packed,
                    "float32": lambda x=x, get=full_weight: F.linear(x, get()),
                    "bfloat16": lambda x=half, get=half_weight: F.linear(x, get()),
                    "memory": block.sum,
                },
                rounds if batch < 100 else 3,
                replays=0 if device == "cpu" else 20 if cached else 200,
            )
            seconds = {name: median(turns) for name, turns in times.items()}
            rate, speed = packed.nbytes / seconds["packed"], block.nbytes / seconds.pop("memory")
            del times["memory"]
            row(
                f"{rows} x {columns}, {batch}",
                "again and again" if cached else "from memory",
                *(show(turns) for turns in times.values()),
                *(f"{seconds[name] / seconds['packed']:.1f}" for name in ("float32", "bfloat16")),
                *((f"{rate / 1e9:.1f}", f"{speed / 1e9:.1f}", f"{rate / speed:.0%}") if batch == 1 else ("", "", "")),
            )


def benchmark_scan(rounds: int, device: str) -> None:
    header(f"hgrn_scan, T = {LENGTH}, d = {WIDTH}", "step loop", "zoo.ops.hgrn_scan", "x", "2T / T", "4T / 2T")

    def make(scan: Callable[..., Any], length: int, backward: bool) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        f = torch.rand(1, length, WIDTH, generator=generator).to(device).requires_grad_(backward)
        v = torch.randn(1, length, WIDTH, generator=generator).to(device).requires_grad_(backward)
        grad = torch.randn(1, length, WIDTH, generator=generator).to(device)

        def call() -> Any:
            with torch.set_grad_enabled(backward):
                states, _ = scan(f, v)
                result = torch.autograd.grad(states, (f, v), grad) if backward else states
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    for backward in (False, True):
        calls = {
            "loop": make(hgrn_scan_reference, LENGTH, backward),
            "zoo": make(hgrn_scan, LENGTH, backward),
            "twice": make(hgrn_scan, 2 * LENGTH, backward),
            "four": make(hgrn_scan, 4 * LENGTH, backward),
        }
        # After another's turn the first calls wait for memory that the allocator gets from the system again.
        times = measured(calls, rounds, at_least=0.3)
        loop, ours, twice, four = (median(times[name]) for name in calls)
        name = "forward + backward" if backward else "forward"
        row(
            name,
            show(times["loop"]),
            show(times["zoo"]),
            f"{loop / ours:.1f}",
            f"{twice / ours:.2f}",
            f"{four / twice:.2f}",
        )


def benchmark_memory(device: str) -> None:
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        print("\nTraining memory: not measured (needs Linux)")
        return

    def peak(tokens: int, sizes: tuple[int, ...], form: str) -> list[int]:
        command = [sys.executable, __file__, "--device", device, "--peak", str(tokens), *map(str, sizes)]
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system
            **({"ZOO_BIT_LINEAR": "ref"} if form == "unfused" else {}),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [int(each) for each in done.stdout.split()[-2:]]

    layers = [(f"{rows} x {columns}", (rows, columns), MEMORY_TOKENS) for rows, columns in MEMORY_SHAPES]
    layers.append((f"a block of {MODEL}", (), BLOCK_TOKENS))
    cases = [(name, sizes, tokens) for name, sizes, lengths in layers for tokens in lengths]
    header("training memory, tokens", "unfused", "fused", "less by", "kept for backward: unfused", "fused")
    with ThreadPoolExecutor(1 if device == "cpu" else 8) as pool:
        found = {(*case, form): pool.submit(peak, *case[1:][::-1], form) for case in cases for form in FORMS}
        for case in cases:
            (unfused, kept), (fused, fused_kept) = (found[*case, form].result() for form in FORMS)
            cells = [f"{each / 1e6:.0f} MB" for each in (unfused, fused, kept, fused_kept)]
            row(f"{case[0]}, {case[2]}", *cells[:2], f"{1 - fused / unfused:.0%}", *cells[2:])


def print_peak(device: str, tokens: int, *sizes: int) -> None:
    """Print by how many bytes a training step raises the peak of this process, and how many the forward pass leaves.

    Of a layer of these sizes, [Cout, Cin], or of a block of the model. Which form runs, the environment says.
    """

    def layer(tokens: int, rows: int, columns: int) -> tuple[Any, Any, torch.Tensor]:
        weight, norm = (0.02 * torch.randn(rows, columns)).requires_grad_(), torch.ones(columns).requires_grad_()
        x = torch.randn(tokens, columns).requires_grad_()
        return lambda x: bit_linear(x, weight, norm), x, torch.randn(tokens, rows)

    def block(tokens: int, **overrides: int) -> tuple[Any, Any, torch.Tensor]:
        config: Any = zoo.get_config(MODEL).override(**overrides)
        made = MatMulFreeBlock(config)
        x = torch.randn(1, tokens, config.hidden_size).requires_grad_()
        return lambda x: made(x, *[None] * 4)[0], x, torch.randn(x.shape)

    def held() -> int:
        return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()

    def step(run: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        before = held()
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is held
        else:
            torch.cuda.reset_peak_memory_stats()
        out = run(x)
        kept = held() - before
        out.backward(grad)
        print((_status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()) - before, kept)

    torch.set_default_device(device)
    step(*(layer(64, 64, 64) if sizes else block(64, hidden_size=64)))  # loads what is loaded once
    step(*(layer(tokens, *sizes) if sizes else block(tokens)))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=["products", "scan", "memory"])
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.device, *map(int, options.peak))
        return
    parts = options.only or ["products", "scan", "memory"]
    device = options.device
    chosen = choose(torch.device(device))
    if device == "cpu":
        print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
        load = f"load average before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
        print(
            f"{options.threads} threads, wall time; {load}; beyond the caches: {beyond_caches(device) / 2**20:.0f} MB"
        )
    else:
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, TF32 off")
    print(f"bit_linear: {chosen.name}: {chosen.reason}")
    with torch.no_grad():
        if "products" in parts:
            benchmark_products(options.rounds, device)
        if "scan" in parts:
            benchmark_scan(options.rounds, device)
    if "memory" in parts:
        benchmark_memory(device)


if __name__ == "__main__":
    main()
