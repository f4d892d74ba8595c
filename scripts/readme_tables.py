"""Rewrites the tables of the README and of docs/ that repeat what the index and the weights manifests say.

    python scripts/readme_tables.py

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced. A test keeps the pages as this writes them.
"""

from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from _sections import replaced

from zoo.pretrained.manifest import Metric, Weights, list_weights
from zoo.registry import index

ROOT = Path(__file__).parent.parent


def models_table() -> str:
    """A row for each image model: costs at its own resolution, published accuracy, weights."""
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
    for entry in _all_weights():
        metric = _metric(entry)
        figure, source = (f"{_value(metric)} ({metric.dataset})", metric.source) if metric else ("-", "-")
        rows.append(f"| `{entry.name}` | {_place(entry)} | {entry.licence} | {figure} | {source} |")
    return "\n".join(rows)


def checkpoints_table() -> str:
    """A row for each tag of a family: which variants have it, where, its licence, its figures, who published them."""
    groups: dict[tuple[str, ...], list[Weights]] = defaultdict(list)
    for entry in _all_weights():
        metric = _metric(entry)
        dataset, source = (metric.dataset, metric.source) if metric else ("-", "-")
        groups[entry.family, entry.tag, _kind(entry), entry.licence, dataset, source].append(entry)
    rows = ["| weights | from | licence | data | top-1 (%) | published by |", "|---|---|---|---|---|---|"]
    for (_, tag, *columns, source), entries in sorted(groups.items(), key=lambda group: group[0][0]):
        figures = ", ".join(_value(_metric(entry)) for entry in entries) if source != "-" else "-"
        names = _names([entry.model for entry in entries], tag)
        rows.append(f"| {' | '.join([names, *columns, figures, source])} |")
    return "\n".join(rows)


def _names(models: list[str], tag: str) -> str:
    """Weights of one tag, named together: ```x_*.tag`: a, b``, with the words that the models have in common as x."""
    if len(models) == 1:
        return f"`{models[0]}.{tag}`"
    words = [model.split("_") for model in models]
    common = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*words, strict=False))]
    stem = "".join(f"{word}_" for word in common)
    return f"`{stem}*.{tag}`: {', '.join(model.removeprefix(stem) for model in models)}"


def _all_weights() -> list[Weights]:
    return [entry for name in index() for entry in list_weights(name)]


def _metric(entry: Weights) -> Metric | None:
    return entry.metrics[0] if entry.metrics else None


def _value(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    return f"{metric.top1:g}" if metric.top1 is not None else f"loss {metric.loss:g}"


def _kind(entry: Weights) -> str:
    """Where a set of weights comes from, in a word."""
    if entry.packaged:
        return "the package"
    owner = entry.hub.partition("/")[0]
    return f"Hub: {owner}" if owner and not entry.pickled else "the authors, to convert"


def _place(entry: Weights) -> str:
    if entry.packaged:
        return "the package"
    if entry.hub:
        return f"Hub: `{entry.hub}`" + (", to convert" if entry.pickled else "")
    return f"[{entry.file}]({entry.url}), to convert" if entry.url else f"[a page]({entry.page}), to convert"


PAGES = {
    "README.md": {"models": models_table, "checkpoints": checkpoints_table},
    "docs/weights.md": {"weights": weights_table},
    "docs/language-models.md": {"language-models": language_models_table},
}


def rendered(page: str) -> str:
    """The page, named by its path in the project, with its tables brought up to date."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        text = replaced(text, name, table())
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(rendered(page), encoding="utf-8")
