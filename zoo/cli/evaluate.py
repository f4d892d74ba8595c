"""``zoo eval``"""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    split: Annotated[str, typer.Option(help="'heldout' or a split; by default the recipe's test split.")] = "",
    root: Annotated[str, typer.Option(help="Where the data set is now, if it has moved.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate the weights of a run folder."""
    from zoo.cli._output import console, print_json
    from zoo.errors import require

    require("accelerate", extra="train", why="Evaluating a run")
    from zoo.train.evaluate import evaluate_run

    figures = evaluate_run(run, split=split, root=root)
    if as_json:
        print_json(figures)
        return
    if "top1" in figures:
        shown, kind = f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %", "pictures"
    elif "map" in figures:
        shown, kind = f"mAP {figures['map']:.2f} %, F1 {figures['f1']:.2f} %", "pictures"
    else:
        shown, kind = f"perplexity {figures['perplexity']:.2f}", "rows of text"
    console().print(
        f"{run}, {figures['split']}: {shown}, loss {figures['loss']:.4f} on {figures['samples']:,} {kind}",
        soft_wrap=True,
        markup=False,
    )
