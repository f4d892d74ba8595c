"""``zoo pareto``: published accuracy against cost measured here, as one HTML file that needs nothing else."""

import dataclasses
import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zoo
from zoo.analysis.pick import Option, gather, pareto_set
from zoo.atomic import write_atomically
from zoo.errors import ConfigError, DataError, require

SUFFIXES = (".html", ".png", ".svg", ".pdf")
_TEMPLATE = Path(__file__).with_name("pareto.html")


def pareto(device: str = "cpu", *, out: str | Path | None = None, others: bool = False) -> list[Option]:
    """The models that are both measured on a device and have a published accuracy, and a page or picture of them.

    Args:
        device: Whose latency is on the axis, ``"cpu"`` or ``"cuda"``.
        out: ``.html`` for a page with filters and a sortable table; ``.png``, ``.svg`` or ``.pdf`` for a picture.
        others: Whether to take records of other machines too.

    Raises:
        DataError: If nothing is measured on the device.
        ConfigError: If the file's type is none of these.
    """
    path = None if out is None else Path(out)
    if path is not None and path.suffix not in SUFFIXES:
        raise ConfigError(f"out is {path.name!r}; expected a name that ends in {', '.join(SUFFIXES)}.")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"out is {str(path)!r}, but there is no folder {str(path.parent)!r}.")
    found = [option for option in gather(device, others=others) if option.top1 is not None]
    if not found:
        raise DataError(
            f"No model is measured on this machine's {device}: run `zoo bench '*' --device {device}` first."
        )
    if path is not None and path.suffix == ".html":
        with write_atomically(path) as file:
            file.write(page(found).encode())
    elif path is not None:
        picture(found, path)
    return found


def page(options: Sequence[Option]) -> str:
    """The page as HTML: data, style and script in one text, no address in it to load anything from."""
    rows = [dataclasses.asdict(option) | {"target": option.target} for option in options]
    # "</" would end the script element that holds the data.
    data = json.dumps(rows).replace("</", "<\\/")
    made = f"zoo {zoo.__version__}, {datetime.now(UTC).date().isoformat()}"
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{made}}", html.escape(made)).replace("{{data}}", data)


def picture(options: Sequence[Option], path: Path) -> None:
    """A scatter of accuracy against latency, a colour for each family, with the Pareto front as a line."""
    pyplot: Any = require("matplotlib.pyplot", extra="train", why="Plotting")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for family in sorted({option.family for option in options}):
        own = [option for option in options if option.family == family]
        axes.scatter([option.latency_ms for option in own], [option.top1 for option in own], label=family, s=28)
    front = pareto_set(options)
    axes.plot([option.latency_ms for option in front], [option.top1 for option in front], color="gray", linewidth=1)
    for option in front:
        axes.annotate(
            option.model, (option.latency_ms, option.top1), fontsize=7, xytext=(4, -8), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.set_xlabel(
        f"latency at batch 1, measured (ms): {' / '.join(sorted({option.target for option in options}))}", fontsize=8
    )
    axes.set_ylabel("published top-1 on ImageNet-1k (%)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
