"""``zoo weights list|download|convert|pack|verify|push|cache``"""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="List, fetch, convert, pack, check and publish weights.", no_args_is_help=True)

_Names = Annotated[list[str], typer.Argument(help="model.tag, a model, hf-hub:owner/name, a .safetensors file, ...")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(
    patterns: Annotated[list[str] | None, typer.Argument(help="Wildcards, such as 'efficientvit*'.")] = None,
    licence: Annotated[str, typer.Option(help="Only those under this licence.")] = "",
    as_json: _Json = False,
) -> None:
    """List every published set of weights: place, layout, licence, accuracy and who published it."""
    from zoo.cli._output import console, print_json, table
    from zoo.errors import WeightsError, nearest
    from zoo.pretrained.fetch import cached_file
    from zoo.pretrained.manifest import get_weights
    from zoo.registry import list_models

    entries = [get_weights(name) for name in list_models(patterns or "", pretrained=True)]
    licences = {entry.licence for entry in entries}
    if licence and licence not in licences:
        raise WeightsError(f"None is under {licence!r}.{nearest(licence, licences)}")
    entries = [entry for entry in entries if licence in ("", entry.licence)]
    if not entries:
        raise WeightsError(f"No weights match {' '.join(patterns or [])!r}. `zoo weights list` shows all.")
    rows: list[dict[str, Any]] = []
    for entry in entries:
        metric = entry.metrics[0] if entry.metrics else None
        rows.append(
            {
                "name": entry.name,
                "place": entry.place,
                "file": None if entry.page else entry.file,
                "revision": entry.revision if entry.hub else None,
                "sha256": entry.sha256 or None,
                "layout": entry.layout,
                "licence": entry.licence,
                "top1": metric.top1 if metric else None,
                "source": metric.source if metric else None,
                "here": cached_file(entry) is not None,
                "needs_conversion": entry.pickled,
            }
        )
    if as_json:
        print_json(rows)
        return
    grid = table("weights", "here", "layout", "licence", ">top-1 (%)", "published by", "from")
    for row in rows:
        here, top1 = "yes" if row["here"] else "", "-" if row["top1"] is None else f"{row['top1']:g}"
        grid.add_row(row["name"], here, row["layout"], row["licence"], top1, row["source"] or "-", row["place"])
    console().print(grid)


@app.command()
def download(names: _Names, as_json: _Json = False) -> None:
    """Fetch weights into the cache, check them, and print their paths."""
    from zoo.cli._output import print_json
    from zoo.pretrained.fetch import fetch
    from zoo.pretrained.source import find_weights

    paths = {name: str(fetch(find_weights(name))) for name in names}
    if as_json:
        print_json(paths)
        return
    for path in paths.values():
        print(path)


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="A model, or the model.tag of weights that are published as a pickle.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config fields, such as num_classes=10.")] = None,
    source: Annotated[Path | None, typer.Option(help="The file to convert; by default that of the tag.")] = None,
    out: Annotated[Path | None, typer.Option(help="The safetensors file to write; by default zoo's cache.")] = None,
    to: Annotated[str, typer.Option(help="Whose parameter names: zoo or authors.")] = "zoo",
) -> None:
    """Convert a weight file of any known layout; a pickle is read, never run."""
    from zoo.errors import ConfigError, WeightsError
    from zoo.pretrained.convert import convert_file
    from zoo.pretrained.fetch import authors_file, converted_path, fetch, origin
    from zoo.pretrained.manifest import get_weights
    from zoo.registry import split_name
    from zoo.train.recipe import parse_value

    tag = split_name(name)[1]
    weights = get_weights(name) if tag else None
    if source is None and weights is None:
        raise WeightsError(f"{name} names no file; give --source FILE, or the tag of its weights.")
    if out is None and (weights is None or not weights.pickled or to != "zoo"):
        raise WeightsError("Where to? Give --out FILE.safetensors.")
    if weights is not None and source is None:
        source = authors_file(weights) if weights.pickled else fetch(weights)
    if weights is not None and out is None:
        out = converted_path(weights)
        out.parent.mkdir(parents=True, exist_ok=True)
    assert source is not None
    assert out is not None
    fields = {}
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no override; expected FIELD=VALUE, such as num_classes=10.")
        fields[key] = parse_value(text)
    licence = {"licence": weights.licence, "source": origin(weights) or weights.place} if weights else {}
    try:
        convert_file(source, out, name, to=to, metadata=licence, **fields)
    except OSError as error:
        raise WeightsError(f"Cannot write {out}: {error.strerror or error}.") from error
    print(out)


@app.command()
def pack(
    name: Annotated[
        str, typer.Argument(help="A model of ternary weights, model.tag, or a place: hf-hub:owner/name, ...")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    checkpoint: Annotated[str, typer.Option(help="Weights in a file or place, instead of those of the tag.")] = "",
    int8_embeddings: Annotated[
        bool, typer.Option("--int8-embeddings", help="Round embeddings to 8 bits too, which changes answers a little.")
    ] = False,
) -> None:
    """Pack ternary weights at two bits each; create_model and `zoo generate` take the file."""
    from zoo.factory import create_model
    from zoo.layers import pack_bit_linears
    from zoo.pretrained.packed import save_packed
    from zoo.pretrained.source import find_weights, is_source

    model = create_model(name, checkpoint=checkpoint) if checkpoint else create_model(name, pretrained=True)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    described = {}
    if is_source(name) or not checkpoint:
        weights = find_weights(name)
        name = weights.name
        described = {"licence": weights.licence, **({"tokenizer": weights.tokenizer} if weights.tokenizer else {})}
    save_packed(pack_bit_linears(model, int8_embeddings=int8_embeddings), out, name, metadata=described)
    after = out.stat().st_size
    print(f"{out}: {after / 1e6:.1f} MB, {before / after:.1f} times less than {before / 1e6:.1f} MB")


@app.command()
def verify(names: _Names, as_json: _Json = False) -> None:
    """Check weights: hash, keys, shapes, finite values, and outputs where they are recorded."""
    from zoo.cli._output import console, print_json, table
    from zoo.errors import ZooError
    from zoo.pretrained.source import find_weights
    from zoo.pretrained.verify import verify as check

    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            rows.append({"name": name, "ok": True, "checked": check(find_weights(name))})
        except ZooError as error:
            rows.append({"name": name, "ok": False, "reason": str(error)})
    if as_json:
        print_json(rows)
    else:
        grid = table("weights", "", "checked")
        for row in rows:
            grid.add_row(
                row["name"], "ok" if row["ok"] else "FAILED", ", ".join(row.get("checked", [row.get("reason")]))
            )
        console().print(grid)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


@app.command()
def push(
    source: Annotated[str, typer.Argument(help="model.tag, local-dir:RUN_FOLDER, or a .safetensors file.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier; by default that of the source.")] = "",
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to commit to.")] = "",
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    dry_run: Annotated[
        Path | None, typer.Option(help="Write the repository into this folder, and send nothing.")
    ] = None,
) -> None:
    """Publish weights on the Hub, where zoo and timm load them as hf-hub:owner/name."""
    from zoo.pretrained.hub import push as send
    from zoo.pretrained.hub import write_repository

    if dry_run is not None:
        write_repository(source, dry_run, licence=licence, repo=repo)
        print(dry_run)
        return
    print(send(source, repo, licence=licence, private=private, revision=revision, message=message))


@app.command()
def cache(
    remove: Annotated[list[str] | None, typer.Option(help="model.tag of weights to remove; may be repeated.")] = None,
    as_json: _Json = False,
) -> None:
    """Show which published weights are on this machine, or remove some."""
    from zoo.cli._output import console, print_json, table
    from zoo.pretrained.fetch import cached_file, remove_cached
    from zoo.pretrained.manifest import get_weights, list_weights

    for name in remove or []:
        remove_cached(get_weights(name))
    rows: list[dict[str, Any]] = []
    for entry in list_weights():
        path = cached_file(entry)
        if path is not None and not entry.packaged:
            rows.append({"name": entry.name, "bytes": path.stat().st_size, "path": str(path)})
    if as_json:
        print_json(rows)
        return
    grid = table("weights", ">MB", "file")
    for row in rows:
        grid.add_row(row["name"], f"{row['bytes'] / 1e6:.1f}", row["path"])
    console().print(grid)
    print(f"{sum(row['bytes'] for row in rows) / 1e6:.1f} MB in all")
