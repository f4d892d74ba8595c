"""``zoo pareto``"""

from pathlib import Path
from typing import Annotated

import typer


def pareto(
    latency: Annotated[str, typer.Option(help="The device whose latency counts: cpu, cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="An .html page to explore, or a .png, .svg, .pdf picture.")] = None,
    others: Annotated[bool, typer.Option(help="Take records of other machines too, and say whose they are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Published accuracy against latency measured here: the Pareto front, as a table, a page or a picture."""
    import dataclasses

    from zoo.analysis.pareto import pareto as run
    from zoo.analysis.pick import pareto_set
    from zoo.cli._output import console, print_json, table

    found = run(latency, out=out, others=others)
    front = pareto_set(found)
    if as_json:
        print_json([dataclasses.asdict(option) | {"pareto": option in front} for option in found])
        return
    grid = table("Pareto front", ">top-1 (%)", ">ms", ">images/s", "measured on")
    for option in front:
        target = ("" if option.here else "elsewhere: ") + option.target
        grid.add_row(option.model, f"{option.top1:g}", f"{option.latency_ms:.3g}", f"{option.images_per_s:.4g}", target)
    screen = console()
    screen.print(grid)
    screen.print(f"{len(found)} models" + (f", in {out}" if out is not None else ""), markup=False, soft_wrap=True)
