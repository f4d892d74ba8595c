"""The README says what the code and the manifests say."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_opens_with_the_two_commands() -> None:
    opening = README[:600]
    assert opening.index("scripts/quickstart") < opening.index("scripts/test")


def test_tables_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as when it runs as a script
    script = runpy.run_path(str(ROOT / "scripts" / "readme_tables.py"))
    for page in script["PAGES"]:
        current = (ROOT / page).read_text(encoding="utf-8")
        assert script["rendered"](page) == current, "run: python scripts/readme_tables.py"


def test_every_family_is_in_the_notice_and_every_path_in_the_readme_exists() -> None:
    from zoo.families import MODULES
    from zoo.registry import get_family

    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for name in MODULES:
        assert get_family(name).paper.partition(" ")[0] in notice, name
    for path in re.findall(r"`((?:scripts|recipes|docs|weights)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
