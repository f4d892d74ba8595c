"""The ``zoo`` command. Each verb is a small file that imports what it needs when it runs: `zoo list` is quick."""

import logging
import sys

import typer

import zoo
from zoo.cli import (
    bench,
    calibrate,
    data,
    doctor,
    evaluate,
    export,
    finetune,
    generate,
    info,
    listing,
    optimize,
    pareto,
    pick,
    predict,
    profile,
    recipes,
    scale,
    weights,
)
from zoo.errors import ZooError

app = typer.Typer(
    name="zoo",
    help="Find, build, train, fine-tune and measure efficient models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(listing.list_models)
app.command("info")(info.info)
app.command("predict")(predict.predict)
app.command("generate")(generate.generate)
app.command("scale")(scale.scale)
app.command("train")(finetune.train)
app.command("finetune")(finetune.finetune)
app.command("eval")(evaluate.evaluate)
app.command("profile")(profile.profile)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.command("pick")(pick.pick)
app.command("pareto")(pareto.pareto)
app.command("export")(export.export)
app.command("optimize")(optimize.optimize)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)
app.add_typer(weights.app, name="weights")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(zoo.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of the command itself; typer prints the help that ``app`` was given."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a :class:`ZooError` is one line on standard error, and its ``exit_code``.

    So is a file or folder that cannot be read or written, with 1.

    Args:
        arguments: Those of the command line by default.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app(arguments)
    except ZooError as error:
        print("zoo:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"zoo: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(1)
