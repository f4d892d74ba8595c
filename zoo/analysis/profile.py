"""``zoo profile``: where a model's time goes, layer by layer, and how far each layer is from what the machine could do.

The ideal time of a layer is the longer of two: its multiply-accumulates at the machine's peak rate, and its bytes at
the machine's memory bandwidth (the roofline, Williams et al. 2009). Both peaks are measured here, by a large matrix
product and by a copy that no cache holds. Efficiency is ideal time / measured time; computational efficiency, as in
"On the Efficiency of Convolutional Neural Networks" (arXiv:2404.03617), is the time of the multiply-accumulates alone
at the peak rate / measured time. A layer whose operands a cache holds can beat the bandwidth of memory: more than 100
%.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.analysis.bench import Conditions, as_measured, call_of, example_input
from zoo.analysis.benchmark import Timing, measure, torch_threads
from zoo.analysis.trace import Operator, by_module, trace
from zoo.config import ModelConfig
from zoo.deploy.program import DTYPES
from zoo.errors import ConfigError, require
from zoo.registry import family_of

PASSES = 7
GEMM = 1024  # rows, columns and sums of the matrix product whose rate is called the peak
COPY_BYTES = 2**28  # more than any cache holds
HIGHEST = 12  # times the ideal at which a plot is cut off


@dataclass(frozen=True)
class Peaks:
    """What the machine was measured to do at best."""

    macs_per_s: float  # of a product of two square matrices of 1024
    bytes_per_s: float  # read and written by a copy of 256 MiB

    @property
    def waterline(self) -> float:
        """MACs for each byte from which on arithmetic, not memory, bounds a layer."""
        return self.macs_per_s / self.bytes_per_s


@dataclass(frozen=True)
class Layer:
    """What one module costs, with all inside it."""

    module: str
    kind: str  # of the operator that takes most of its time
    params: int
    macs: int
    activations: int  # elements that operators with MACs write
    bytes_moved: int  # read and written by all operators, each tensor once for each operator
    seconds: float
    ideal_s: float
    bound: str  # "arithmetic" or "memory"

    @property
    def efficiency(self) -> float:
        return self.ideal_s / self.seconds if self.seconds else 0.0

    @property
    def intensity(self) -> float:
        """MACs for each byte moved."""
        return self.macs / self.bytes_moved if self.bytes_moved else 0.0


@dataclass(frozen=True)
class Profile:
    """A model's layers, and the model as a whole."""

    model: str
    batch: int
    conditions: Conditions
    peaks: Peaks
    layers: tuple[Layer, ...]
    total: Layer  # all operators
    latency_s: float  # of the whole model, untraced
    quartiles_s: tuple[float, float]

    @property
    def outside_s(self) -> float:
        """What Python and dispatch take besides operators; around 0, and even below, where tracing disturbs more."""
        return self.latency_s - self.total.seconds

    @property
    def computational_efficiency(self) -> float:
        """The model's MACs at the peak rate / its measured latency."""
        return self.total.macs / self.peaks.macs_per_s / self.latency_s

    @property
    def roofline_efficiency(self) -> float:
        """The sum of the layers' ideal times / the measured latency."""
        return sum(layer.ideal_s for layer in self.layers) / self.latency_s


def measure_peaks(conditions: Conditions) -> Peaks:
    """Measure this machine's peaks, in the precision and with the threads and the clock of ``conditions``."""
    dtype = DTYPES[conditions.precision]
    a, b = (torch.ones(GEMM, GEMM, device=conditions.device, dtype=dtype) for _ in range(2))
    source = torch.ones(COPY_BYTES, device=conditions.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    timings = measure(
        {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)},
        device=conditions.device,
        threads=conditions.threads,
        clock=conditions.clock,
        rounds=5,
    )
    # The best round: a peak is what the machine can do when nothing disturbs it.
    return Peaks(GEMM**3 / min(timings["product"].rounds), 2 * COPY_BYTES / min(timings["copy"].rounds))


def profile(
    model: str | ModelConfig,
    *,
    batch: int = 1,
    depth: int | None = None,
    conditions: Conditions | None = None,
    peaks: Peaks | None = None,
) -> Profile:
    """Profile a model by name or config, with random weights.

    Args:
        model: Its name or config.
        batch: Samples in a pass.
        depth: At which depth of modules to stop, 1 for the outermost; all the way to the layers by default.
        conditions: By default the CPU in float32, fused. Only ``backend="eager"`` has layers to time.
        peaks: Those of this machine, if they were measured before.

    Raises:
        UnknownModelError: If there is no such model.
        ConfigError: If a condition cannot be met here.
    """
    conditions = conditions or Conditions()
    conditions.check()
    if batch < 1 or (depth is not None and depth < 1):
        raise ConfigError(f"batch is {batch} and depth {depth}; expected at least 1.")
    if conditions.backend != "eager":
        raise ConfigError(f"backend is {conditions.backend!r}; only 'eager' runs layer by layer.")
    config = zoo.get_config(model) if isinstance(model, str) else model
    with torch_threads(conditions.threads):
        peaks = peaks or measure_peaks(conditions)
        network = as_measured(zoo.build(config), conditions)
        operators = _timed(network, config, batch, conditions)
        timing: Timing = measure(
            {"model": call_of(network, config, conditions, batch)},
            device=conditions.device,
            threads=conditions.threads,
            clock=conditions.clock,
            rounds=conditions.rounds,
        )["model"]
    itemsize = DTYPES[conditions.precision].itemsize
    groups = _layers(operators, depth)
    layers = tuple(_layer(network, module, own, peaks, itemsize) for module, own in groups.items())
    total = _layer(network, "", operators, peaks, itemsize)
    return Profile(
        model=model if isinstance(model, str) else family_of(config).name,
        batch=batch,
        conditions=conditions,
        peaks=peaks,
        layers=layers,
        total=total,
        latency_s=timing.median,
        quartiles_s=timing.quartiles,
    )


def _timed(network: Any, config: ModelConfig, batch: int, conditions: Conditions) -> list[Operator]:
    x = example_input(config, batch, tokens=conditions.tokens, device=conditions.device)
    x = x.to(DTYPES[conditions.precision]) if x.is_floating_point() else x
    trace(network, x)
    passes = [trace(network, x, clock=conditions.clock) for _ in range(PASSES)]
    return [
        replace(calls[0], seconds=statistics.median(call.seconds or 0.0 for call in calls))
        for calls in zip(*passes, strict=True)
    ]


def _layers(operators: Sequence[Operator], depth: int | None) -> dict[str, list[Operator]]:
    """The operators by module, in order of execution, modules cut at ``depth``; each operator once."""
    groups: dict[str, list[Operator]] = {}
    for operator in operators:
        path = operator.module if depth is None else ".".join(operator.module.split(".")[:depth])
        groups.setdefault(path, []).append(operator)
    return groups


def _layer(network: Any, module: str, operators: Sequence[Operator], peaks: Peaks, itemsize: int) -> Layer:
    macs = sum(operator.macs for operator in operators)
    moved = itemsize * sum(operator.elements for operator in operators)
    arithmetic, memory = macs / peaks.macs_per_s, moved / peaks.bytes_per_s
    owner = network.get_submodule(module)
    # Of a module whose children are rows of their own, only the parameters it holds itself.
    inside = by_module(operators).keys() - {"", module}
    deep = (module == "" and len(inside) > 0) or any(path.startswith(f"{module}.") for path in inside)
    seconds: dict[str, float] = {}
    for operator in operators:
        seconds[operator.kind] = seconds.get(operator.kind, 0.0) + (operator.seconds or 0.0)
    return Layer(
        module=module,
        kind=max(seconds, key=lambda kind: seconds[kind]) if seconds else "",
        params=sum(parameter.numel() for parameter in owner.parameters(recurse=deep or not list(owner.children()))),
        macs=macs,
        activations=sum(operator.results for operator in operators),
        bytes_moved=moved,
        seconds=sum(seconds.values()),
        ideal_s=max(arithmetic, memory),
        bound="arithmetic" if arithmetic >= memory else "memory",
    )


def plot(profile: Profile, path: str | Path) -> None:
    """Draw the efficiency gap and the waterline of arXiv:2404.03617, one above the other, as a PNG, SVG or PDF.

    Efficiency gap: a rectangle for each layer, as wide as its MACs and as high as its seconds for each MAC, so that its
    area is its time; under the line at 1 / peak rate is what the MACs alone would take at the peak, and the gap is the
    rest; what is more than 12 times as high as the line is cut off. Waterline: MACs for each byte of each layer,
    over the same axis; what is under the line is bound by memory.
    Layers without MACs take time but no width; their time is written in the title.
    """
    pyplot: Any = require("matplotlib.pyplot", extra="train", why="Plotting")
    layers = [layer for layer in profile.layers if layer.macs]
    widths = [layer.macs / 1e6 for layer in layers]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    peaks = profile.peaks
    figure, (gap, water) = pyplot.subplots(2, 1, figsize=(10, 8), sharex=True, layout="constrained")
    colours = {"arithmetic": "#2a6f97", "memory": "#e07a5f"}
    ideal = 1e12 / peaks.macs_per_s
    heights = [1e12 * layer.seconds / layer.macs for layer in layers]
    gap.bar(starts, heights, widths, align="edge", color=[colours[layer.bound] for layer in layers], linewidth=0)
    gap.axhline(ideal, color="black", linewidth=1)
    gap.set_ylim(0, min(1.05 * max(heights), HIGHEST * ideal))  # a line for a small layer would flatten all others
    gap.set_ylabel("measured time / MACs (ps)")
    rest = sum(layer.seconds for layer in profile.layers if not layer.macs)
    computational, roofline = 100 * profile.computational_efficiency, 100 * profile.roofline_efficiency
    gap.set_title(
        f"{profile.model}, batch {profile.batch}: computational efficiency {computational:.0f} %, "
        f"roofline efficiency {roofline:.0f} %\n"
        f"{1e3 * profile.latency_s:.3g} ms, of which layers without MACs take {1e3 * rest:.2g} ms"
    )
    water.bar(
        starts,
        [layer.intensity for layer in layers],
        widths,
        align="edge",
        color=[colours[layer.bound] for layer in layers],
        linewidth=0,
    )
    water.axhline(peaks.waterline, color="black", linewidth=1)
    water.set_yscale("log")
    water.set_ylabel("MACs / bytes moved")
    water.set_xlabel("MACs of the layers in order of execution (millions), counted by zoo.analysis.trace")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    labels = [f"bound by {bound}" for bound in colours]
    gap.legend([*handles, gap.lines[0]], [*labels, f"peak measured here: {peaks.macs_per_s / 1e9:.0f} GMAC/s"])
    water.legend(
        [*handles, water.lines[0]],
        [*labels, f"waterline: peak / {peaks.bytes_per_s / 1e9:.1f} GB/s of a copy measured here"],
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
