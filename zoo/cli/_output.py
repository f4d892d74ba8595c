"""Printing for people and for machines."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """A console as wide as the terminal, or wide enough for any table when the output goes elsewhere."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


def print_json(value: Any) -> None:
    """Indented JSON on standard output."""
    print(json.dumps(value, indent=2))


def table(*columns: str) -> Table:
    """A plain table; a column whose name starts with ``>`` is aligned right."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return grid


def millions(count: int | None) -> str:
    """``12473772`` -> ``"12.47"``."""
    return "-" if count is None else f"{count / 1e6:.2f}"
