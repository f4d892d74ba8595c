"""``zoo profile``"""

from pathlib import Path
from typing import Annotated

import typer


def profile(
    model: Annotated[str, typer.Argument(help="A model.")],
    device: Annotated[str, typer.Option(help="Where to run it: cpu, cuda; meta only counts.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Samples in a pass.")] = 1,
    depth: Annotated[int | None, typer.Option(help="Depth of modules to show, 1 for the outermost.")] = None,
    top: Annotated[int | None, typer.Option(help="Show only so many layers, those that take most time.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU; all cores by default.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    fuse: Annotated[bool, typer.Option(help="Fuse the model, as for inference.")] = True,
    clock: Annotated[str, typer.Option(help="wall, or cpu: the process's time on all cores.")] = "wall",
    tokens: Annotated[int, typer.Option(help="Length of a language model's input.", min=1)] = 128,
    plot: Annotated[Path | None, typer.Option(help="Also draw efficiency gap and waterline: PNG, SVG or PDF.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a model's time goes: of each layer MACs, bytes, time, distance to the ideal, and more."""
    import dataclasses

    from zoo.analysis.bench import Conditions
    from zoo.analysis.profile import plot as draw
    from zoo.analysis.profile import profile as run
    from zoo.cli._output import console, print_json, table

    if device == "meta":
        _print_counts(model, depth, precision, tokens, as_json=as_json)
        return
    conditions = Conditions(device=device, threads=threads, precision=precision, fuse=fuse, clock=clock, tokens=tokens)
    found = run(model, batch=batch, depth=depth, conditions=conditions)
    if plot is not None:
        draw(found, plot)
    if as_json:
        values = dataclasses.asdict(found)
        values |= {
            "computational_efficiency": found.computational_efficiency,
            "roofline_efficiency": found.roofline_efficiency,
        }
        print_json(values)
        return
    out = console()
    grid = table(
        "layer",
        "kind",
        ">params",
        ">MMACs",
        ">activations",
        ">MB moved",
        ">ms",
        ">% of time",
        ">MACs/B",
        "bound by",
        ">of ideal",
    )
    layers = list(found.layers)
    if top is not None:
        layers = sorted(layers, key=lambda layer: -layer.seconds)[:top]
    for layer in [*layers, found.total]:
        whole = layer is found.total
        grid.add_row(
            "all operators" if whole else layer.module or model,
            "" if whole else layer.kind,
            f"{layer.params:,}",
            f"{layer.macs / 1e6:.2f}",
            f"{layer.activations:,}",
            f"{layer.bytes_moved / 1e6:.2f}",
            f"{1e3 * layer.seconds:.3f}",
            f"{100 * layer.seconds / found.total.seconds:.1f}",
            f"{layer.intensity:.1f}",
            layer.bound,
            f"{100 * layer.efficiency:.0f} %",
        )
    out.print(grid)
    low, high = (1e3 * seconds for seconds in found.quartiles_s)
    out.print(
        f"\nwhole model {1e3 * found.latency_s:.3g} ms ({low:.3g} to {high:.3g}), "
        f"of which outside operators {1e3 * found.outside_s:.2g} ms",
        markup=False,
    )
    out.print(
        f"peak measured here {found.peaks.macs_per_s / 1e9:.1f} GMAC/s and {found.peaks.bytes_per_s / 1e9:.1f} GB/s: "
        f"below {found.peaks.waterline:.1f} MACs/B memory bounds a layer",
        markup=False,
    )
    out.print(
        f"computational efficiency {100 * found.computational_efficiency:.1f} % (MACs at the peak rate / latency), "
        f"roofline efficiency {100 * found.roofline_efficiency:.1f} % (sum of ideal times / latency)",
        markup=False,
    )
    if found.computational_efficiency > 1:
        out.print("No model beats the peak: other work slowed the machine while it was measured. Run it again.")


def _print_counts(model: str, depth: int | None, precision: str, tokens: int, *, as_json: bool) -> None:
    """What each module costs, with all inside it, from the config alone."""
    import dataclasses

    import zoo
    from zoo.analysis.bench import Conditions
    from zoo.analysis.counts import count_modules
    from zoo.cli._output import console, print_json, table
    from zoo.config import TextConfig
    from zoo.deploy.program import DTYPES

    Conditions(device="meta", precision=precision).check()
    config = zoo.get_config(model)
    length = tokens if isinstance(config, TextConfig) else None
    counts = count_modules(config, dtype=DTYPES[precision], tokens=length)
    deepest = max(path.count(".") + 1 for path in counts) if depth is None else depth
    shown = {path: each for path, each in counts.items() if not path or path.count(".") < deepest}
    if as_json:
        print_json({path: dataclasses.asdict(each) for path, each in shown.items()})
        return
    sizes = (">weights (MB)", ">activations (MB)", ">moved (MB)")
    grid = table("module", ">params", ">MMACs", ">activations", *sizes)
    for path, each in shown.items():
        grid.add_row(
            path or model,
            f"{each.params:,}",
            f"{each.macs / 1e6:.2f}",
            f"{each.activations:,}",
            f"{each.weight_bytes / 1e6:.3f}",
            f"{each.activation_bytes / 1e6:.3f}",
            f"{each.moved_bytes / 1e6:.3f}",
        )
    console().print(grid)
