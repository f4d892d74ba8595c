"""Rewrites the tables of README.md that repeat what the index and the weights manifests say.

    python scripts/readme_tables.py

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced. A test keeps the README as this writes it.
"""

import re
from pathlib import Path
from typing import Any

from zoo.pretrained.manifest import Weights, list_weights
from zoo.registry import index

README = Path(__file__).parent.parent / "README.md"


def models_table() -> str:
    """A row for each variant: costs at its own resolution, published accuracy, weights."""
    rows = ["| model | params (M) | MACs (M) | px | top-1 (%) | weights |", "|---|---:|---:|---:|---:|---|"]
    for name, entry in _of_task("image-classification"):
        weights = list_weights(name)
        size = entry["img_size"]
        side = size if isinstance(size, int) else " x ".join(map(str, size))
        top1 = next((f"{metric.top1:.1f}" for each in weights for metric in each.metrics if metric.top1), "-")
        tags = ", ".join(f"`{each.tag}`" for each in weights) or "-"
        rows.append(
            f"| `{name}` | {entry['params'] / 1e6:.2f} | {entry['macs'] / 1e6:,.1f} | {side} | {top1} | {tags} |"
        )
    return "\n".join(rows)


def language_models_table() -> str:
    """A row for each variant: costs of a token, the length that it is trained at, weights."""
    rows = ["| model | params (M) | MACs a token (M) | tokens | weights |", "|---|---:|---:|---:|---|"]
    for name, entry in _of_task("text-generation"):
        tags = ", ".join(f"`{each.tag}`" for each in list_weights(name)) or "-"
        costs = f"{entry['params'] / 1e6:,.2f} | {entry['macs'] / 1e6:,.1f}"
        rows.append(f"| `{name}` | {costs} | {entry['seq_len']:,} | {tags} |")
    return "\n".join(rows)


def _of_task(task: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry) for name, entry in index().items() if entry["task"] == task]


def weights_table() -> str:
    """A row for each set of weights: where it is, its licence, its figures and who published them."""
    rows = ["| weights | from | licence | top-1 (%) | published by |", "|---|---|---|---:|---|"]
    for entry in (entry for name in index() for entry in list_weights(name)):
        metric = entry.metrics[0] if entry.metrics else None
        value = None if metric is None else f"{metric.top1:g}" if metric.top1 is not None else f"loss {metric.loss:g}"
        figure, source = (f"{value} ({metric.dataset})", metric.source) if metric else ("-", "-")
        rows.append(f"| `{entry.name}` | {_place(entry)} | {entry.licence} | {figure} | {source} |")
    return "\n".join(rows)


def _place(entry: Weights) -> str:
    if entry.packaged:
        return "the package"
    if entry.hub:
        return f"Hub: `{entry.hub}`" + (", to convert" if entry.pickled else "")
    return f"[{entry.file}]({entry.url}), to convert" if entry.url else f"[a page]({entry.page}), to convert"


def rendered(text: str) -> str:
    """The README with its tables brought up to date."""
    for name, table in {
        "models": models_table(),
        "language-models": language_models_table(),
        "weights": weights_table(),
    }.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        assert re.search(pattern, text, re.DOTALL), f"README.md has no <!-- {name} --> section"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
