"""What a run came to, as pictures and as one page of HTML."""

import base64
import io
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import require
from zoo.train.run_folder import write_file, write_text

if TYPE_CHECKING:
    from PIL import Image


# what a run is judged by besides its loss, and how people call it
FIGURES = {"top1": "top-1 (%)", "map": "mAP (%)", "perplexity": "perplexity"}


def require_plotting() -> Any:
    """matplotlib, or the error that names the extra to install; to be called before hours of work."""
    return require("matplotlib", extra="train", why="Plotting the curves")


def plot_curves(
    history: list[dict[str, float]], path: Path, *, other: dict[str, list[dict[str, float]]] | None = None
) -> None:
    """Loss and held-out accuracy by epoch, as a PNG.

    Args:
        history: A row an epoch, as in ``metrics.csv``.
        path: Where to write.
        other: Histories of other runs to draw beside it, by name.

    Raises:
        TrainingError: If the file cannot be written.
    """
    with write_file(path) as file:
        file.write(_curves(history, other))


def _curves(history: list[dict[str, float]], other: dict[str, list[dict[str, float]]] | None = None) -> bytes:
    pyplot = _pyplot()
    figure = next((each for each in FIGURES if history and f"val_{each}" in history[0]), "perplexity")
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, rows) in enumerate({"": history, **(other or {})}.items()):
        epochs = [row["epoch"] for row in rows]
        style: dict[str, Any] = {"linestyle": "-" if i == 0 else "--", "marker": "." if len(rows) == 1 else None}
        prefix = f"{name}: " if name else ""
        left.plot(epochs, [row["train_loss"] for row in rows], color="C0", label=f"{prefix}training", **style)
        left.plot(epochs, [row["val_loss"] for row in rows], color="C1", label=f"{prefix}held out", **style)
        right.plot(epochs, [row[f"val_{figure}"] for row in rows], color="C1", label=f"{prefix}held out", **style)
        if rows and "ema_loss" in rows[0]:
            left.plot(epochs, [row["ema_loss"] for row in rows], color="C2", label=f"{prefix}averaged weights", **style)
            averaged = [row[f"ema_{figure}"] for row in rows]
            right.plot(epochs, averaged, color="C2", label=f"{prefix}averaged weights", **style)
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set(xlabel="epoch", ylabel=FIGURES[figure])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return _png(canvas)


@dataclass
class Page:
    """What :func:`write_report` shows.

    Attributes:
        title: What was trained on what.
        history: A row an epoch.
        facts: Lines of a table, as (what, value).
        pictures: PNG files' bytes, each with what it shows.
        texts: What a language model writes, each with what it was given.
        skipped: Samples that could not be read: where they are, and why.
    """

    title: str
    history: list[dict[str, float]]
    facts: list[tuple[str, str]]
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def write_report(page: Page, path: Path) -> None:
    """Write one file of HTML that needs no other.

    Raises:
        TrainingError: If it cannot be written.
    """
    parts = [f"<h1>{escape(page.title)}</h1>", _table(page.facts)]
    for caption, data in [("Loss and accuracy by epoch", _curves(page.history)), *page.pictures]:
        encoded = base64.b64encode(data).decode()
        parts.append(f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="data:image/png;base64,{encoded}">')
    for prompt, text in page.texts:
        parts.append(f"<h2>What it writes after {escape(repr(prompt))}</h2><pre>{escape(text)}</pre>")
    if page.skipped:
        parts.append(f"<h2>{len(page.skipped)} samples could not be read</h2>{_table(list(page.skipped.items()))}")
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(page.title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    write_text(path, html)


_STYLE = "body{font:16px sans-serif;margin:2em auto;max-width:64em}img{max-width:100%}td{padding:.1em 1em .1em 0}"


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in rows)
    return f"<table>{''.join(cells)}</table>"


def confusion_picture(counts: np.ndarray, classes: tuple[str, ...]) -> bytes:
    """A confusion matrix as a PNG: ``counts[i, j]`` samples of class i were taken for class j."""
    pyplot = _pyplot()
    side = min(max(4.0, 0.35 * len(classes)), 14.0)
    canvas, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    canvas.colorbar(image, ax=axes, label="share of the class's samples")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    return _png(canvas)


def class_figures_picture(precisions: np.ndarray, f1: np.ndarray, classes: tuple[str, ...]) -> bytes:
    """Average precision and F1 of each class, ``[C]`` from 0 to 1 and NaN where unknown, as a PNG: the worst 40."""
    pyplot = _pyplot()
    order = np.argsort(precisions, kind="stable")[:40][::-1]  # NaN comes last
    canvas, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(order)), layout="constrained")
    places = np.arange(len(order))
    axes.barh(places + 0.2, 100 * precisions[order], 0.4, label="average precision")
    axes.barh(places - 0.2, 100 * f1[order], 0.4, label="F1 at a probability of one half")
    axes.set_yticks(places, [classes[i] for i in order])
    axes.set(xlabel="%", xlim=(0, 100))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _png(canvas)


def mistakes_picture(mistakes: "list[tuple[Image.Image, str]]") -> bytes:
    """Pictures with captions, five in a row, as a PNG."""
    pyplot = _pyplot()
    rows = -(-len(mistakes) // 5)
    canvas, grid = pyplot.subplots(rows, 5, figsize=(11, 2.5 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, caption) in zip(grid.flat, mistakes, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8)
    return _png(canvas)


def _png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        canvas.savefig(buffer, dpi=120, format="png")
    finally:
        _pyplot().close(canvas)
    return buffer.getvalue()


def _pyplot() -> Any:
    matplotlib = require_plotting()
    matplotlib.use("Agg")  # a picture in a file, whatever the screen
    from matplotlib import pyplot

    return pyplot
