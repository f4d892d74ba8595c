"""How costs grow, as a table and a picture; and the command line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.analysis.scaling import growth, write
from zoo.cli import main
from zoo.scaling.solver import measure_latency


def run(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_table_and_picture(tmp_path: Path) -> None:
    rows = growth("efficientvit_m0", ("width", "resolution"), (1.0, 2.0), device=None)
    assert [(row["rule"], row["factor"]) for row in rows] == [
        ("width", 1.0), ("width", 2.0), ("resolution", 1.0), ("resolution", 2.0),
    ]  # fmt: skip
    assert rows[0]["macs"] == rows[2]["macs"] < rows[1]["macs"]
    assert rows[1]["activations"] < rows[3]["activations"]  # what the paper claims
    assert all(row["latency_ms"] is None for row in rows)
    table, picture = write(rows, tmp_path / "new", title="a title")
    with table.open() as file:
        assert [row["params"] for row in csv.DictReader(file)] == [str(row["params"]) for row in rows]
    assert "a title" in picture.read_text()
    with pytest.raises(zoo.ConfigError, match="at least one rule"):
        growth("efficientvit_m0", (), device=None)
    of_a_language_model = growth("matmulfree_2m", factors=(1.0,), device=None)
    assert [row["rule"] for row in of_a_language_model] == ["depth", "width", "dw", "language"]


def test_time_is_measured(tmp_path: Path) -> None:
    config = zoo.get_config("efficientvit_m0").override(img_size=64)
    (row,) = growth(config, ("width",), (1.0,))
    assert row["latency_ms"] > 0


def test_language_models_are_measured_too() -> None:
    config = zoo.get_config("matmulfree_2m").override(hidden_size=64, num_hidden_layers=1)
    assert measure_latency(config) > 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "config.json"
    assert (
        run("scale", "efficientvit_m0", "--rule", "w", "--macs", "1.5x", "--no-time", "--json", "--out", str(out)) == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert row["rule"] == "width"
    assert abs(row["error"]) < 0.02
    assert zoo.config_from_json(out.read_text()) == zoo.scale("efficientvit_m0", "w", macs="1.5x")


def test_compare(capsys: pytest.CaptureFixture) -> None:
    assert run("scale", "efficientvit_m0", "--factor", "2", "--compare", "--no-time") == 0
    text = capsys.readouterr().out
    for rule in ("fast", "depth", "width", "resolution", "dw", "dr", "wr", "dwr", "compound", "resnet_rs"):
        assert f"\n{rule} " in text, rule
    assert "tiny: factor is 2; the tiny rule only makes networks smaller" in text
    assert "arXiv:2103.06877" in text
    assert "widths = [" in text


@pytest.mark.parametrize(
    "arguments, code, line",
    [
        (("--rule", "fsat", "--flops", "2"), 2, "Did you mean: fast?"),
        (("--flops", "0"), 2, "flops is 0.0; expected a positive number."),
        (("--macs", "four"), 2, "macs is 'four'; expected a positive number, or a multiple such as '4x'."),
        ((), 2, "Expected one target of factor, phi"),
        (("--flops", "2", "--img-size", "250"), 2, "the nearest are 240 and 256."),
        (("--flops", "2", "--out", "nowhere/config.json"), 2, "there is no folder nowhere."),
        (("--curve", "file/folder"), 1, "Not a directory."),
    ],
)
def test_command_says_what_is_wrong(
    arguments: tuple[str, ...], code: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert run("scale", "efficientvit_m0", *arguments) == code
    out, error = capsys.readouterr()
    assert not out
    assert line in error
    assert error.startswith("zoo: ")
    assert error.count("\n") == 1
