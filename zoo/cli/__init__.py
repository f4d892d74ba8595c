"""The ``zoo`` command. Each verb is a small file that imports what it needs when it runs, so that `zoo list` is quick."""

import logging
import sys

import typer

from zoo.cli import evaluate, finetune, info, listing, predict
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
app.command("train")(finetune.train)
app.command("finetune")(finetune.finetune)
app.command("eval")(evaluate.evaluate)


@app.callback()
def _configure(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        import zoo

        print(zoo.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; a :class:`ZooError` is one line on standard error, and its ``exit_code``."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
