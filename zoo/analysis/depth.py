"""How deep a recursive language model went, token by token: in colours, by position, by kind of token."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from zoo.atomic import write_atomically
from zoo.data.tokens import Tokenizer
from zoo.errors import ConfigError, require

_COLOURS = (255, 153, 157, 222, 209, 204)  # of the terminal's 256: backgrounds of depth 0, 1, 2, ...
KINDS = ("line break", "space", "start of a word", "rest of a word", "number", "punctuation", "other")
_MOST_POINTS = 64  # of the curve over positions


def pieces_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds; a character of several tokens comes with its last one."""
    pieces, shown = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        whole = end == len(tokens) or not text.endswith("\ufffd")
        pieces.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return pieces


def coloured(pieces: Sequence[str], depths: Sequence[int]) -> str:
    """The text for a terminal, each piece on the colour of its token's depth; those beyond ``depths`` as they are."""
    out = []
    for i, piece in enumerate(pieces):
        if i >= len(depths):
            out.append(piece)
            continue
        start = f"\x1b[38;5;16;48;5;{_colour(depths[i])}m"
        # A line break in colour would paint the rest of the line.
        out.append("\n".join(f"{start}{part}\x1b[0m" if part else "" for part in piece.split("\n")))
    return "".join(out)


def legend(depths: Sequence[int], num_recursions: int) -> str:
    """One line: each depth on its colour, the share of tokens that took it, and the mean."""
    counts = [depths.count(depth) for depth in range(num_recursions + 1)]
    shown = [
        f"\x1b[38;5;16;48;5;{_colour(depth)}m {depth} \x1b[0m {100 * count / len(depths):.0f} %"
        for depth, count in enumerate(counts)
        if count or depth
    ]
    return f"recursions: {'  '.join(shown)}  mean {sum(depths) / len(depths):.2f}"


def _colour(depth: int) -> int:
    return _COLOURS[min(depth, len(_COLOURS) - 1)]


def kind_of(piece: str, before: str = "") -> str:
    """Which of :data:`KINDS` a token is, by its text and the text before it."""
    inner = piece.strip()
    if "\n" in piece and not inner:
        return "line break"
    if not inner:
        return "space" if piece else "other"
    if inner.isalpha():
        goes_on = piece[0].isalpha() and before[-1:].isalpha()
        return "rest of a word" if goes_on else "start of a word"
    if inner.isnumeric():
        return "number"
    return "other" if any(letter.isalnum() for letter in inner) else "punctuation"


def mean_depths(texts: Iterable[tuple[Sequence[str], Sequence[int]]]) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Depths by position and by kind.

    Args:
        texts: (pieces, depths) of each text.

    Returns:
        All depths at position 0, 1, ..., and all depths of each kind that occurs.
    """
    by_position: list[list[int]] = []
    by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for pieces, depths in texts:
        before = ""
        for position, (piece, depth) in enumerate(zip(pieces, depths, strict=False)):
            if position == len(by_position):
                by_position.append([])
            by_position[position].append(depth)
            by_kind[kind_of(piece, before)].append(depth)
            before = piece or before
    return by_position, {kind: depths for kind, depths in by_kind.items() if depths}


def check_picture(path: Path) -> None:
    """Raise :class:`ConfigError` if :func:`plot_depths` draws no picture of this name, or has nowhere to put it."""
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} for {path.name}; expected one that is there.")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path} is no picture; expected a name that ends in .png, .svg or .pdf.")


def plot_depths(texts: Iterable[tuple[Sequence[str], Sequence[int]]], num_recursions: int, path: Path) -> None:
    """Draw mean depth over the position, and for each kind of token.

    Args:
        texts: (pieces, depths) of each text.
        num_recursions: The model's.
        path: PNG, SVG or PDF.

    Raises:
        ConfigError: If the format is another.
    """
    check_picture(path)
    figure_module: Any = require("matplotlib.figure", extra="train", why="Plotting")
    by_position, by_kind = mean_depths(texts)
    width = -(-len(by_position) // _MOST_POINTS)
    points = [list(chain(*by_position[start : start + width])) for start in range(0, len(by_position), width)]
    canvas = figure_module.Figure(figsize=(10, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.plot([start * width for start in range(len(points))], [sum(each) / len(each) for each in points], marker=".")
    left.set(xlabel="position (tokens)", ylabel="mean recursions", ylim=(0, num_recursions + 0.1))
    kinds = list(by_kind)
    bars = right.barh(kinds, [sum(each) / len(each) for each in by_kind.values()], color="C1")
    right.bar_label(bars, [f"{len(each):,}" for each in by_kind.values()], padding=3, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="mean recursions; number of tokens at the bars", xlim=(0, num_recursions * 1.15))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with write_atomically(path) as file:
        canvas.savefig(file, format=path.suffix[1:].lower(), dpi=110)
