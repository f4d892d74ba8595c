"""``zoo info``"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zoo.config import ModelConfig
    from zoo.pretrained.manifest import Weights


def _record(weights: "Weights") -> dict[str, Any]:
    """A set of weights as plain values; of a packaged file, its path."""
    import dataclasses

    values = dataclasses.asdict(weights)
    del values["folder"]
    return {"name": weights.name, **values, "path": str(weights.path) if weights.packaged else None}


def _costs(variant: str, config: "ModelConfig") -> dict[str, int]:
    """From the index, which needs no torch, unless the weights' config differs from the variant's."""
    import dataclasses

    from zoo.registry import get_config, index

    if variant in index() and config == get_config(variant):
        return {key: index()[variant][key] for key in ("params", "macs", "activations")}
    from zoo.analysis.counts import count

    return dataclasses.asdict(count(config))


def info(
    name: Annotated[str, typer.Argument(help="A model, or model.tag.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's card: paper, config, costs, weights with their licence, figures and recipe."""
    import zoo
    from zoo.cli._output import console, print_json, table
    from zoo.pretrained.manifest import get_weights, list_weights
    from zoo.registry import family_of, split_name

    config = zoo.get_config(name)
    family = family_of(config)
    variant, tag = split_name(name)
    costs = _costs(variant, config)
    weights = [get_weights(name)] if tag else list_weights(variant)
    if as_json:
        print_json(
            {
                "name": name,
                "family": family.name,
                "title": family.title,
                "task": family.task,
                "paper": family.paper,
                "code": family.code,
                "code_licence": family.licence,
                "config": config.to_dict(),
                "costs": costs,
                "weights": [_record(each) for each in weights],
            }
        )
        return
    out = console()
    out.print(f"[bold]{name}[/bold]  {family.title}, {family.task}")
    facts = table("", "")
    facts.show_header = False
    facts.add_row("paper", family.paper)
    facts.add_row("original code", f"{family.code} ({family.licence})")
    facts.add_row(
        "costs",
        f"{costs['params']:,} parameters, {costs['macs'] / 1e6:,.1f} MMACs, {costs['activations']:,} activations",
    )
    for field, value in config.to_dict().items():
        facts.add_row(field, repr(value))
    out.print(facts)
    for each in weights:
        place = f"packaged with zoo ({each.file})" if each.packaged else each.place
        out.print(f"\n[bold]{each.name}[/bold]  {place}, licence {each.licence}", soft_wrap=True)
        if each.pickled:
            out.print("a pickle, to convert once: `zoo weights convert`")
        facts = table("", "")
        facts.show_header = False
        for metric in each.metrics:
            facts.add_row(metric.dataset, f"{metric.words}  ({metric.source})")
        pre = each.preprocessing
        if family.task == "text-generation":
            facts.add_row("tokenizer", each.tokenizer or "unknown")
        else:
            size = f"{pre.img_size[0]} x {pre.img_size[1]} px"
            facts.add_row("input", f"{size}, crop {pre.crop_pct:g}, {pre.interpolation}")
        facts.add_row("recipe", each.recipe or "unknown")
        if each.notes:
            facts.add_row("notes", each.notes)
        out.print(facts)
    if not weights:
        out.print("\nNo published weights are known.")
