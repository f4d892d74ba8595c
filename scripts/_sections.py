"""The parts of pages that scripts write: what lies between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

import re
from pathlib import Path

from zoo.atomic import write_atomically


def replaced(text: str, name: str, new: str) -> str:
    """The text of a page with ``new`` as its section ``name``."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    assert re.search(pattern, text, re.DOTALL), f"there is no <!-- {name} --> section"
    return re.sub(pattern, lambda match: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)


def replace(page: Path, name: str, new: str) -> None:
    """Write ``new`` into a page, as its section ``name``."""
    text = replaced(page.read_text(encoding="utf-8"), name, new)
    with write_atomically(page) as file:
        file.write(text.encode())
