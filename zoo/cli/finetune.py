"""``zoo train`` and ``zoo finetune``"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zoo.train.recipe import Recipe

_AUTO, _NEVER = "auto", "never"  # what becomes of a run that the folder holds already

_Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that zoo ships.")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as optim.lr=1e-3 data.root=PATH.")]
_Out = Annotated[Path | None, typer.Option(help="The run folder; by default runs/<recipe>.")]
_Resume = Annotated[
    str,
    typer.Option(
        metavar=f"{_AUTO}|{_NEVER}",
        help=f"{_AUTO}: continue the run in the folder, or start one where there is none. {_NEVER}: start.",
    ),
]
_Show = Annotated[bool, typer.Option("--show", help="Print the resolved recipe and exit.")]


_Data = Annotated[
    str, typer.Option(help="Pictures to fine-tune MODEL on without a recipe: class folders, a file or a Hub data set.")
]


def train(
    recipe: _Recipe, overrides: _Overrides = None, out: _Out = None, resume: _Resume = _NEVER, show: _Show = False
) -> None:
    """Train a model as a recipe says."""
    from zoo.train.recipe import find_recipe, load_recipe

    go_on = _goes_on(resume)
    _run(load_recipe(recipe, overrides or []), out or Path("runs") / find_recipe(recipe).stem, go_on, show)


def finetune(
    recipe: Annotated[str, typer.Argument(help="As for `zoo train`; or, with --data, a model with weights.")],
    overrides: _Overrides = None,
    data: _Data = "",
    out: _Out = None,
    resume: _Resume = _NEVER,
    show: _Show = False,
) -> None:
    """Fine-tune pretrained weights, as a recipe says or, with --data, on pictures without a recipe.

    With train.from_scratch, beside the same from random weights.
    """
    from zoo.errors import RecipeError
    from zoo.registry import is_model
    from zoo.train.recipe import find_recipe, load_recipe

    go_on = _goes_on(resume)
    if not data:
        if is_model(recipe) and not Path(recipe).exists():
            raise RecipeError(f"{recipe!r} is a model; expected --data with it, or a recipe (`zoo recipes list`).")
        _run(load_recipe(recipe, overrides or []), out or Path("runs") / find_recipe(recipe).stem, go_on, show)
        return
    from zoo.train.automatic import finetune_recipe

    choice = finetune_recipe(recipe, data, overrides or [])
    if not show:
        print(*choice.notes, sep="\n")
    _run(choice.recipe, out or Path("runs") / f"{recipe}-{Path(data).stem}", go_on, show)


def _goes_on(resume: str) -> bool:
    """Whether a run that the folder holds already is continued."""
    from zoo.errors import RecipeError, nearest

    if resume not in (_AUTO, _NEVER):
        raise RecipeError(f"--resume is {resume!r}; expected {_AUTO} or {_NEVER}.{nearest(resume, (_AUTO, _NEVER))}")
    return resume == _AUTO


def _run(recipe: "Recipe", out: Path, resume: bool, show: bool) -> None:
    from zoo.cli._output import console, table
    from zoo.errors import require

    if show:
        print(recipe.to_toml(), end="")
        return
    require("accelerate", extra="train", why="Training")
    from accelerate import PartialState

    from zoo.train.finetune import finetune
    from zoo.train.report import FIGURES

    try:
        comparison = finetune(recipe, out, resume=resume)
    except KeyboardInterrupt as interrupt:
        print(f"zoo: interrupted; with --resume auto the same command continues {out}.", file=sys.stderr)
        raise typer.Exit(130) from interrupt
    if not PartialState().is_main_process:  # one of several says it
        return
    screen = console()
    figure = next(each for each in FIGURES if each in comparison.result.metrics)
    grid = table("held-out part", f">{FIGURES[figure]}", ">loss (nats)", ">epoch", ">minutes")
    for label, result in (("this run", comparison.result), ("from scratch", comparison.from_scratch)):
        if result is None:
            continue
        rows = [(label, result.metrics)]
        if result.raw and result.raw != result.metrics:
            rows = [(f"{label}, averaged weights (kept)", result.metrics), (f"{label}, raw weights", result.raw)]
        for name, figures in rows:
            minutes = f"{result.seconds / 60:.1f}"
            grid.add_row(name, f"{figures[figure]:.2f}", f"{figures['loss']:.4f}", str(result.epoch), minutes)
    screen.print(grid)
    say = partial(screen.print, soft_wrap=True, markup=False)
    say(f"\nWeights, curves and metrics are in {out}. Go on with:")
    say(f"  zoo eval {shlex.quote(str(out))}")
    if figure != "perplexity":
        say(f"  zoo predict {shlex.quote(str(out / 'sample.png'))} --model {shlex.quote(str(out))}")
