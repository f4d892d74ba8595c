"""``zoo scale``"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zoo.scaling import Fit


def _row(found: "Fit", latency: str | None) -> dict[str, Any]:
    """What the table and the JSON say of one result."""
    import dataclasses

    from zoo.scaling.solver import measure_latency

    return {
        "rule": found.rule,
        "depth": found.factors.depth,
        "width": found.factors.width,
        "resolution": found.factors.resolution,
        **dataclasses.asdict(found.counts),
        "latency_ms": None if latency is None else measure_latency(found.config, latency),
        "quantity": found.quantity,
        "target": found.target,
        "achieved": found.achieved,
        "error": found.error,
        "config": found.config.to_dict(),
    }


def scale(
    model: Annotated[str, typer.Argument(help="A model, or model.tag.")],
    rule: Annotated[str, typer.Option(help="How to spend the budget; `zoo scale MODEL --compare` shows all.")] = "fast",
    flops: Annotated[float | None, typer.Option(help="Counted MACs, as a multiple of the model's.")] = None,
    macs: Annotated[str | None, typer.Option(help="Counted MACs: a number, or a multiple such as 4x.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters, likewise.")] = None,
    activations: Annotated[str | None, typer.Option(help="Activations, likewise.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Median milliseconds of a pass, measured here.")] = None,
    factor: Annotated[float | None, typer.Option(help="The rule's own arithmetic, without a search.")] = None,
    phi: Annotated[float | None, typer.Option(help="The same for the rule compound, in its unit.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the input in pixels, whatever the rule says.")] = None,
    target: Annotated[str, typer.Option(help="The device to measure on.")] = "cpu",
    alpha: Annotated[float | None, typer.Option(help="Of fast: width's share. Of compound: depth's base.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of compound: width's base.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Of compound: resolution's base.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of resnet_rs: how long training will be.")] = None,
    vocabulary: Annotated[float | None, typer.Option(help="Of language: the vocabulary's exponent.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Every rule side by side.")] = False,
    time: Annotated[bool, typer.Option(help="Measure how long a pass takes.")] = True,
    curve: Annotated[
        Path | None, typer.Option(help="Write here how costs grow with the factor, by each rule: a CSV and a picture.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the config here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Scale a model to a budget by a rule from the literature, or compare what every rule makes of it."""
    import zoo
    from zoo.atomic import write_atomically
    from zoo.cli._output import console, millions, print_json, table
    from zoo.config import ImageConfig
    from zoo.errors import ConfigError, reason
    from zoo.scaling import fit, get_rule, rules_for

    base = zoo.get_config(model)
    timed = target if time and isinstance(base, ImageConfig) else None
    if curve is not None:
        _curve(model, curve, timed)
        return
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out is {out}, and there is no folder {out.parent}.")
    named = {
        "flops": flops,
        "macs": _number(macs),
        "params": _number(params),
        "activations": _number(activations),
        "latency_ms": latency_ms,
        "factor": factor,
        "phi": phi,
    }
    budget: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    own = {"alpha": alpha, "beta": beta, "gamma": gamma, "epochs": epochs, "vocabulary": vocabulary}
    options: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    where: dict[str, Any] = {"target": target, "img_size": img_size}
    rows, refused = [], []
    chosen = fit(model, rule, **budget, **options, **where)
    rows.append(_row(chosen, timed))
    if compare:
        for name in rules_for(base):
            if name == chosen.rule:
                continue
            try:  # without options: alpha is width's share in fast, and depth's base in compound
                rows.append(_row(fit(model, name, **budget, **where), timed))
            except ConfigError as error:
                refused.append((name, reason(error)))
    if out is not None:
        with write_atomically(out) as file:
            file.write(chosen.config.to_json().encode())
    if as_json:
        print_json({"model": model, "rows": rows, "refused": dict(refused)} if compare else rows[0])
        return
    screen = console()
    grid = table("rule", ">d", ">w", ">r", ">params (M)", ">MACs (M)", ">activations (M)", ">ms", f">{chosen.quantity}")
    for row in rows:
        grid.add_row(
            row["rule"],
            *(f"{row[name]:.3f}" for name in ("depth", "width", "resolution")),
            *(millions(row[name]) for name in ("params", "macs", "activations")),
            "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}",
            f"{row['achieved']:.4g} ({row['error']:+.1%})",
        )
    screen.print(grid)
    for name, why in refused:
        screen.print(f"{name}: {why}", soft_wrap=True)
    changed = {name: value for name, value in chosen.config.to_dict().items() if value != base.to_dict()[name]}
    screen.print(f"\n{model} by {chosen.rule}: {get_rule(rule).source}", soft_wrap=True)
    for name, value in changed.items():
        screen.print(f"  {name} = {list(value) if isinstance(value, tuple) else value}", soft_wrap=True)
    if chosen.quantity != "factor" and not chosen.met:
        screen.print("The target is missed by more than 2 %: the nearest that this family's rounding allows.")


def _curve(model: str, folder: Path, device: str | None) -> None:
    """Write how costs grow with the factor, by each rule."""
    import torch

    from zoo.analysis.scaling import growth, write
    from zoo.cli._output import console

    folder.mkdir(parents=True, exist_ok=True)  # before all the work: what cannot be written is said at once
    rows = growth(model, device=device, report=lambda line: console().print(line))
    where = "" if device is None else f"; time on {device}, batch 1, {torch.get_num_threads()} threads"
    for path in write(rows, folder, title=f"{model} by each rule{where}"):
        console().print(f"wrote {path}", soft_wrap=True)


def _number(text: str | None) -> float | str | None:
    """``"2e9"`` as a number; ``"4x"``, and what is neither, as it is: the solver explains what it expects."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
