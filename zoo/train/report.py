"""Pictures of a run."""

from pathlib import Path
from typing import Any

from zoo.errors import require
from zoo.train.run_folder import write_file


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
    pyplot = _pyplot()
    figure = "top1" if history and "val_top1" in history[0] else "perplexity"
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
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)" if figure == "top1" else figure)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    try:
        with write_file(path) as file:
            canvas.savefig(file, dpi=120, format="png")
    finally:
        pyplot.close(canvas)


def _pyplot() -> Any:
    matplotlib = require_plotting()
    matplotlib.use("Agg")  # a picture in a file, whatever the screen
    from matplotlib import pyplot

    return pyplot
