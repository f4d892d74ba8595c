"""How parameters, MACs, activations and measured time grow with a scaling factor, for each rule: a table and a picture.

What to look for (arXiv:2103.06877): rules that mostly widen let activations grow as about the square root of the cost,
those that deepen or enlarge the input as the cost itself; and run time follows activations rather than MACs.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.atomic import write_atomically
from zoo.config import ModelConfig
from zoo.errors import ConfigError, require
from zoo.registry import get_config
from zoo.scaling import counts_of, fit, rules_for
from zoo.scaling.solver import measure_latency

RULES = ("depth", "width", "resolution", "dwr", "fast")
FACTORS = (1.0, 2.0, 4.0, 8.0)
QUANTITIES = {"params": "parameters", "macs": "MACs", "activations": "activations", "latency_ms": "time of a pass"}
CSV_FILE, PICTURE_FILE = "scaling.csv", "scaling.svg"


def growth(
    model: str | ModelConfig,
    rules: Sequence[str] | None = None,
    factors: Sequence[float] = FACTORS,
    *,
    device: str | None = "cpu",
    report: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each rule and factor, by the rule's own arithmetic.

    Args:
        model: A variant's name, or a config.
        rules: Names of rules that the family can follow; by default ``RULES``, of a language model all it can.
        factors: Of cost; 1 is the model itself.
        device: Where passes of one sample are timed, fused; None for none.
        report: Called with a line for each row, as it is done.

    Returns:
        Rows with ``rule``, ``factor``, the rule's ``depth``, ``width`` and ``resolution``, counts, and ``latency_ms``,
        which is None where nothing was timed.
    """
    if rules is None:
        possible = rules_for(get_config(model) if isinstance(model, str) else model)
        rules = RULES if set(RULES) <= set(possible) else possible
    if not rules or not factors:
        raise ConfigError("Nothing to compare; expected at least one rule and one factor.")
    rows: list[dict[str, Any]] = []
    timed: dict[ModelConfig, float] = {}
    for rule in rules:
        for factor in sorted(factors):
            found = fit(model, rule, factor=factor)
            if device is not None and found.config not in timed:
                timed[found.config] = measure_latency(found.config, device)
            counts = counts_of(found.config)
            rows.append(
                {
                    "rule": found.rule,
                    "factor": factor,
                    "depth": found.factors.depth,
                    "width": found.factors.width,
                    "resolution": found.factors.resolution,
                    "params": counts.params,
                    "macs": counts.macs,
                    "activations": counts.activations,
                    "latency_ms": timed.get(found.config),
                }
            )
            if report is not None:
                report(f"{found.rule} x {factor:g}")
    return rows


def write(rows: list[dict[str, Any]], folder: str | Path, *, title: str = "") -> tuple[Path, Path]:
    """Write ``scaling.csv`` and ``scaling.svg`` into a folder, which is made; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(folder / CSV_FILE) as file:
        file.write(text.getvalue().encode())
    picture = io.BytesIO()
    matplotlib = require("matplotlib", extra="train", why="The picture")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zoo"}):  # small, and the same every time
        _plot(rows, title).savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
    with write_atomically(folder / PICTURE_FILE) as file:
        file.write(picture.getvalue())
    return folder / CSV_FILE, folder / PICTURE_FILE


def _plot(rows: list[dict[str, Any]], title: str) -> Any:
    """A panel for each quantity, relative to the smallest factor, both axes logarithmic."""
    figure_module = require("matplotlib.figure", extra="train", why="The picture")
    shown = [name for name in QUANTITIES if all(row[name] is not None for row in rows)]
    figure = figure_module.Figure(figsize=(3.1 * len(shown), 3.2))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    factors = sorted({row["factor"] for row in rows})
    for axis, name in zip(axes, shown, strict=True):
        for power, text in ((1.0, "s"), (0.5, "√s")):
            axis.plot(factors, [(s / factors[0]) ** power for s in factors], color="0.75", linestyle="--", linewidth=1)
            end = (factors[-1], (factors[-1] / factors[0]) ** power)
            axis.annotate(text, end, xytext=(3, 0), textcoords="offset points", color="0.45", fontsize=8)
        for rule in dict.fromkeys(row["rule"] for row in rows):
            mine = [row for row in rows if row["rule"] == rule]
            relative = [row[name] / mine[0][name] for row in mine]
            axis.plot([row["factor"] for row in mine], relative, marker="o", markersize=3, label=rule)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_title(QUANTITIES[name], fontsize=10)
        axis.set_xlabel("scaling factor s")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes[0].legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11, y=1.02)
    return figure
