"""The ``zoo`` command. Each verb is a small file that imports what it needs when it runs: `zoo list` is quick."""

import logging
import sys
from typing import Any

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
from zoo.errors import ZooError, nearest

_UsageError: Any = typer.BadParameter.__base__  # of what typer refuses, BadParameter is the one kind that it exports

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


def _usage_line(error: Any) -> str:
    """What typer found wrong with the command line, and what was expected; nothing if it has shown the help instead."""
    said, command = error.format_message().removesuffix("."), error.ctx.command_path if error.ctx else "zoo"
    if not said:
        return ""
    if hasattr(error, "possibilities"):
        options = [name for each in error.ctx.command.get_params(error.ctx) for name in each.opts + each.secondary_opts]
        said = f"`{command}` has no option {error.option_name}.{nearest(error.option_name, options)}"
    elif not error.message and getattr(error.param, "help", None):
        said += f": {error.param.help}"
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} `{command} --help` shows what it takes."


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a :class:`ZooError` is one line on standard error, and its ``exit_code``.

    So are a command, option or argument that typer refuses, with 2, and a file or folder that cannot be read or
    written, with 1.

    Args:
        arguments: Those of the command line by default.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    try:
        sys.exit(app(arguments, prog_name="zoo", standalone_mode=False) or 0)
    except typer.Abort:
        print("zoo: aborted.", file=sys.stderr)
        sys.exit(1)
    except _UsageError as error:
        if line := _usage_line(error):
            print("zoo:", line, file=sys.stderr)
        sys.exit(2)
    except ZooError as error:
        print("zoo:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"zoo: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(1)
