"""``zoo data inspect`` and ``zoo data pack``"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at data sets, and pack them for fast reading.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="What a recipe's data.name takes: a folder, a file, owner/name, ...")]
_Split = Annotated[str, typer.Option(help="The split.")]


@app.command()
def inspect(
    name: _Name,
    split: _Split = "train",
    sheet: Annotated[Path | None, typer.Option(help="Also write a sheet of pictures, as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count pictures and classes, measure sizes, and find what is damaged or there twice."""
    from rich.progress import Progress

    from zoo.cli._output import console, print_json, table
    from zoo.data.inspect import contact_sheet, inspect_pictures
    from zoo.data.sources import open_source

    source = open_source(name, split=split)
    screen = console()
    with Progress(console=screen, transient=True, disable=as_json or not screen.is_terminal) as bar:
        task = bar.add_task("reading", total=len(source))
        found = inspect_pictures(source, on_picture=lambda: bar.advance(task))
    if sheet is not None:
        contact_sheet(source, sheet)
    if as_json:
        print_json(dataclasses.asdict(found) | {"imbalance": found.imbalance})
        return
    screen.print(
        f"{found.samples:,} pictures of {len(found.per_class)} classes, {found.total_bytes / 1e6:,.1f} MB", markup=False
    )
    screen.print(f"formats: {', '.join(f'{kind} {count:,}' for kind, count in found.formats.items())}", markup=False)
    for what, sides in (("width", found.widths), ("height", found.heights)):
        screen.print(f"{what}: {sides[0]} to {sides[2]} pixels, median {sides[1]}", markup=False)
    screen.print(f"the largest class has {found.imbalance:.2f} times the pictures of the smallest", markup=False)
    grid = table("class", ">pictures")
    ranked = sorted(found.per_class.items(), key=lambda item: -item[1])
    rows = [(label, f"{count:,}") for label, count in ranked]
    for row in rows if len(rows) <= 20 else [*rows[:10], ("...", ""), *rows[-10:]]:
        grid.add_row(*row)
    screen.print(grid)
    screen.print(f"{found.duplicates} are there twice, {len(found.corrupt)} cannot be read", markup=False)
    for reason in list(found.corrupt.values())[:20]:
        screen.print(f"  {reason}", markup=False, soft_wrap=True)


@app.command()
def pack(
    name: _Name,
    out: Annotated[Path, typer.Argument(help="The folder to write; a second call goes on where one was interrupted.")],
    split: _Split = "train",
    tokenizer: Annotated[str, typer.Option(help="Pack text: 'bytes', a tokenizer.json, or a name on the Hub.")] = "",
    column: Annotated[str, typer.Option(help="Where JSONL, parquet and Hub data sets have their text.")] = "text",
    streaming: Annotated[bool, typer.Option(help="Do not download a Hub data set of text first.")] = False,
    per_shard: Annotated[int, typer.Option(help="Pictures in a shard.", min=1)] = 1000,
) -> None:
    """Write pictures as tar shards or, with --tokenizer, text as memory-mapped tokens."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from zoo.cli._output import console

    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        if tokenizer:
            from zoo.data.text import open_documents
            from zoo.data.tokens import read_tokens, write_tokens

            documents = open_documents(name, split=split, column=column, streaming=streaming)
            task = bar.add_task("tokens", total=None)
            write_tokens(
                documents, tokenizer, out, split, on_piece=lambda _, tokens: bar.update(task, completed=tokens)
            )
            done = f"{len(read_tokens(out, split)):,} tokens"
        else:
            from zoo.data.pack import pack_pictures
            from zoo.data.sources import open_source

            source = open_source(name, split=split)
            task = bar.add_task("pictures", total=len(source))
            skipped = pack_pictures(
                source, out, split, per_shard=per_shard, on_shard=lambda count: bar.update(task, completed=count)
            )
            done = f"{len(source):,} pictures" + (f", {len(skipped)} of which were left out" if skipped else "")
    screen.print(f"{out}, split {split}: {done}. Train on it with data.root={out}", markup=False, soft_wrap=True)
