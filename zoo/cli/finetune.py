"""``zoo train`` and ``zoo finetune``"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

_Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that zoo ships.")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as optim.lr=1e-3 data.root=PATH.")]
_Out = Annotated[Path | None, typer.Option(help="The run folder; by default runs/<recipe>.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, if there is one.")]
_Show = Annotated[bool, typer.Option("--show", help="Print the resolved recipe and exit.")]


def train(
    recipe: _Recipe, overrides: _Overrides = None, out: _Out = None, resume: _Resume = False, show: _Show = False
) -> None:
    """Train a model as a recipe says."""
    _run(recipe, overrides or [], out, resume, show)


def finetune(
    recipe: _Recipe, overrides: _Overrides = None, out: _Out = None, resume: _Resume = False, show: _Show = False
) -> None:
    """Fine-tune pretrained weights as a recipe says; with train.from_scratch, beside the same from random weights."""
    _run(recipe, overrides or [], out, resume, show)


def _run(name: str, overrides: list[str], out: Path | None, resume: bool, show: bool) -> None:
    from zoo.cli._output import console, table
    from zoo.errors import require
    from zoo.train.recipe import find_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    if show:
        print(recipe.to_toml(), end="")
        return
    require("accelerate", extra="train", why="Training")
    from accelerate import PartialState

    from zoo.train.finetune import finetune

    out = out or Path("runs") / find_recipe(name).stem
    try:
        comparison = finetune(recipe, out, resume=resume)
    except KeyboardInterrupt as interrupt:
        print(f"zoo: interrupted; with --resume the same command continues {out}.", file=sys.stderr)
        raise typer.Exit(130) from interrupt
    if not PartialState().is_main_process:  # one of several says it
        return
    screen = console()
    figure, heading = ("top1", ">top-1 (%)") if "top1" in comparison.result.metrics else ("perplexity", ">perplexity")
    grid = table("held-out part", heading, ">loss (nats)", ">epoch", ">minutes")
    for label, result in (("this run", comparison.result), ("from scratch", comparison.from_scratch)):
        if result is not None:
            grid.add_row(
                label,
                f"{result.metrics[figure]:.2f}",
                f"{result.metrics['loss']:.4f}",
                str(result.epoch),
                f"{result.seconds / 60:.1f}",
            )
    screen.print(grid)
    say = partial(screen.print, soft_wrap=True, markup=False)
    say(f"\nWeights, curves and metrics are in {out}. Go on with:")
    say(f"  zoo eval {shlex.quote(str(out))}")
    if figure == "top1":
        say(f"  zoo predict {shlex.quote(str(out / 'sample.png'))} --model {shlex.quote(str(out))}")
