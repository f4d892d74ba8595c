"""``zoo recipes``"""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="The recipes that zoo ships, and your own.", no_args_is_help=True)

_Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that zoo ships.")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as optim.lr=1e-3.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_recipes(
    patterns: Annotated[list[str] | None, typer.Argument(help="Wildcards, such as 'efficientvit/*'.")] = None,
    as_json: _Json = False,
) -> None:
    """List recipes: what each trains, on what, for how long."""
    from fnmatch import fnmatch

    from zoo.cli._output import console, print_json, table
    from zoo.errors import RecipeError, nearest
    from zoo.train import recipe as recipes

    known = recipes.list_recipes()
    names = [name for name in known if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        wanted = " ".join(patterns or [])
        raise RecipeError(f"No recipe matches {wanted!r}.{nearest(wanted.strip('*'), known)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        resolved = recipes.load_recipe(name)
        rows.append(
            {
                "name": name,
                "model": resolved.model.name,
                "data": resolved.data.name,
                "epochs": resolved.schedule.epochs,
                "batch_size": resolved.train.batch_size,
                "teacher": resolved.distill.teacher,
                "numbers": recipes.read_layers(name)[-1].numbers,
            }
        )
    if as_json:
        print_json(rows)
        return
    grid = table("recipe", "model", "data", ">epochs", ">batch", "teacher", "numbers")
    for row in rows:
        grid.add_row(*(str(value) for value in row.values()))
    console().print(grid)


@app.command("show")
def show(recipe: _Recipe, overrides: _Overrides = None, as_json: _Json = False) -> None:
    """Print a resolved recipe with the origin of each value: paper, ours, base, default or override."""
    from rich.markup import escape

    from zoo.cli._output import console, print_json, table
    from zoo.train.provenance import explain, header
    from zoo.train.recipe import read_layers

    values = explain(recipe, overrides or [])
    about = header(read_layers(recipe)[-1].path)
    if as_json:
        rows = [{"key": each.key, "value": each.value, "origin": each.origin} for each in values]
        print_json({"recipe": recipe, "header": about, "values": rows})
        return
    out = console()
    out.print(about, markup=False, soft_wrap=True)
    grid = table("key", "value", "origin")
    for each in values:
        style = "dim" if each.origin == "default" else ""
        grid.add_row(each.key, escape(repr(each.value)), each.origin, style=style)
    out.print()
    out.print(grid)


@app.command("copy")
def copy(
    recipe: _Recipe,
    to: Annotated[Path, typer.Argument(help="The file to write, or a folder to write it into.")] = Path(),
    overrides: _Overrides = None,
) -> None:
    """Copy a recipe to a file of your own, whole, so that it needs no base."""
    from zoo.errors import RecipeError
    from zoo.train.provenance import header
    from zoo.train.recipe import find_recipe, load_recipe
    from zoo.train.run_folder import write_text

    source = find_recipe(recipe)
    target = to / source.name if to.is_dir() else to.with_suffix(".toml")
    if target.exists():
        raise RecipeError(f"{target} exists; expected the name of a new file.")
    about = "".join(
        f"# {line}".rstrip() + "\n" for line in [f"Copied from {recipe}.", "", *header(source).splitlines()]
    )
    write_text(target, about + "\n" + load_recipe(recipe, overrides or []).to_toml())
    print(target)


@app.command("check")
def check(
    recipes: Annotated[list[str] | None, typer.Argument(help="Files or names; by default all that zoo ships.")] = None,
) -> None:
    """Check recipes: they can be read, their values make sense, and their models and configs exist."""
    from zoo.cli._output import console
    from zoo.train.provenance import find_problems
    from zoo.train.recipe import list_recipes

    names = recipes or list_recipes()
    problems = [problem for name in names for problem in find_problems(name)]
    out = console()
    for problem in problems:
        out.print(problem, markup=False, soft_wrap=True)
    out.print(f"{len(names)} recipes, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command("diff")
def diff(
    left: _Recipe,
    right: Annotated[str, typer.Argument(help="Another one; a run folder's recipe.toml does as well.")],
    as_json: _Json = False,
) -> None:
    """Print the values in which two resolved recipes differ."""
    from rich.markup import escape

    from zoo.cli._output import console, print_json, table
    from zoo.train.provenance import explain

    both = [{each.key: each.value for each in explain(name)} for name in (left, right)]
    keys = list(dict.fromkeys([*both[0], *both[1]]))
    rows = [(key, both[0].get(key), both[1].get(key)) for key in keys if both[0].get(key) != both[1].get(key)]
    if as_json:
        print_json([{"key": key, "left": a, "right": b} for key, a, b in rows])
        return
    grid = table("key", left, right)
    for key, *values in rows:
        grid.add_row(key, *("-" if value is None else escape(repr(value)) for value in values))
    console().print(grid if rows else "no difference")
