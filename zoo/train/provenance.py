"""Where each value of a recipe comes from. Imports no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.train.recipe import Recipe, find_recipe, leaves, load_recipe, parse_overrides, read_layers

_TABLE = re.compile(r"\s*\[([\w.]+)\]")
_KEY = re.compile(r"\s*([\w.]+)\s*=")
_OURS = re.compile(r"#\s*ours\b")


@dataclass(frozen=True)
class Value:
    """A value of a resolved recipe.

    Attributes:
        key: Its dotted name.
        value: What it is.
        origin: ``"paper"`` (a paper's or its authors' code's), ``"ours"``, either of them as ``"base: ..."``,
            ``"override"`` (the command line's), or ``"default"`` (the recipe format's).
    """

    key: str
    value: Any
    origin: str


def explain(recipe: str | Path, overrides: Iterable[str] = ()) -> list[Value]:
    """Every value of a recipe with its origin, in the format's order. Arguments and errors are ``load_recipe``'s."""
    overrides = list(overrides)
    resolved = load_recipe(recipe, overrides)
    layers = read_layers(recipe)
    origins: dict[str, str] = {}
    for layer in layers:
        prefix = "base: " if layer is not layers[-1] else ""
        ours = _marked(layer.path)
        for key in _keys(layer.values):
            marked = any(key == name or key.startswith(f"{name}.") for name in ours)
            origins[key] = prefix + ("ours" if marked else layer.numbers)
    origins |= {key: "override" for key, _ in parse_overrides(overrides)}
    return [Value(key, value, _origin(key, origins)) for key, value in _values(resolved)]


def header(path: Path) -> str:
    """The comment that a recipe's file begins with, without the marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def find_problems(recipe: str | Path) -> list[str]:
    """What is wrong with a recipe, a line each; nothing if it can be read and its model, config and weights exist."""
    from zoo.pretrained.manifest import get_weights
    from zoo.registry import get_config

    try:
        resolved = load_recipe(recipe)
        get_config(resolved.model.name).override(**resolved.model.overrides)
        if resolved.model.pretrained:
            get_weights(resolved.model.name)
    except ZooError as error:
        message = str(error)
        return [message if str(recipe) in message else f"{recipe}: {message}"]
    about = header(find_recipe(recipe))
    if not about:
        return [f"{recipe} has no header; expected a first comment that says what it trains and by which command."]
    name = Path(recipe).with_suffix("").name
    if not re.search(rf"(zoo (train|finetune)).*{re.escape(name)}", about):
        return [f"{recipe}: its header has no command; expected a line such as `zoo train {recipe}`."]
    return []


def _origin(key: str, origins: dict[str, str]) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]  # a whole table may have been overridden
    return "default"


def _values(recipe: Recipe) -> Iterable[tuple[str, Any]]:
    """The recipe's values; those of its open table, ``model.overrides``, one by one."""
    for key, value in leaves(recipe):
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _keys(values: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _marked(path: Path) -> list[str]:
    """Dotted names of the keys, or of the tables, in whose line a file says ``# ours``."""
    table, names = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _TABLE.match(line):
            table = f"{match[1]}."
            if _OURS.search(line):
                names.append(match[1])
        elif (match := _KEY.match(line)) and _OURS.search(line):
            names.append(table + match[1])
    return names
