"""``zoo list``"""

from typing import Annotated, Any

import typer


def list_models(
    patterns: Annotated[list[str] | None, typer.Argument(help="Wildcards, such as 'efficientvit*'.")] = None,
    pretrained: Annotated[bool, typer.Option(help="One row for each set of weights.")] = False,
    task: Annotated[str | None, typer.Option(help="Only models for this task.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List models: parameters, MACs, resolution, published top-1 and weight tags."""
    import zoo
    from zoo.cli._output import console, millions, print_json, table
    from zoo.errors import UnknownModelError, nearest
    from zoo.pretrained.manifest import get_weights, list_weights
    from zoo.registry import families, index, split_name

    if task is not None:
        tasks = {entry["task"] for entry in index().values()} | {family.task for family in families()}
        if task not in tasks:
            raise UnknownModelError(f"No model is for task {task!r}; expected {' or '.join(sorted(tasks))}.")
    names = zoo.list_models(patterns or "", pretrained=pretrained, task=task)
    if not names:
        wanted = " ".join(patterns or [])
        kind = "pretrained model" if pretrained else "model"
        raise UnknownModelError(f"No {kind} matches {wanted!r}.{nearest(wanted.strip('*'), zoo.list_models())}")
    rows: list[dict[str, Any]] = []
    for name in names:
        variant, tag = split_name(name)
        entry = dict(index().get(variant, {}))
        weights = [get_weights(name)] if tag else list_weights(variant)
        if tag and weights[0].config:  # a network of other classes or another size: `zoo info` counts it
            entry = {} if entry.get("task") == "text-generation" else {"img_size": weights[0].preprocessing.img_size[0]}
        published = [metric for each in weights for metric in each.metrics if metric.top1 is not None]
        rows.append(
            {
                "name": name,
                "params": entry.get("params"),
                "macs": entry.get("macs"),
                "img_size": entry.get("img_size"),
                "top1": published[0].top1 if published else None,
                "dataset": published[0].dataset if published else None,
                "tags": [each.tag for each in weights],
            }
        )
    if as_json:
        print_json(rows)
        return
    grid = table("model", ">params (M)", ">MACs (M)", ">px", ">top-1 (%)", "weights")
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.1f}"
        size = "-" if row["img_size"] is None else str(row["img_size"])
        grid.add_row(row["name"], millions(row["params"]), millions(row["macs"]), size, top1, ", ".join(row["tags"]))
    console().print(grid)
