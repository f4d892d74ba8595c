"""``zoo data``: what is in a data set, and packing it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.sources import open_source
from zoo.data.tokens import read_tokens


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_inspect(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "inspect", class_folder, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert "60 pictures of 3 classes" in out
    assert "width: 40 to 40 pixels, median 40" in out
    assert Image.open(tmp_path / "sheet.png").width == 1120
    code, out, _ = run(capsys, "data", "inspect", class_folder, "--json")
    assert json.loads(out)["per_class"] == {"blue": 20, "green": 20, "red": 20}


def test_pack_pictures(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "pack", class_folder, tmp_path / "out", "--per-shard", 25)
    assert (code, out) == (
        0,
        f"{tmp_path / 'out'}, split train: 60 pictures. Train on it with data.root={tmp_path / 'out'}\n",
    )
    assert len(open_source(str(tmp_path / "out"))) == 60
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_pack_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text("abc")
    code, out, _ = run(capsys, "data", "pack", tmp_path / "some.txt", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 0
    assert "split train: 4 tokens." in out
    assert read_tokens(tmp_path / "out", "train").pieces[0].tolist() == [*b"abc", 256]


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (("inspect", "digts"), ("pack", "digts", tmp_path / "out")):
        code, _, err = run(capsys, "data", *verb)
        assert code == 2
        assert err.startswith("zoo: Unknown data set 'digts'. Did you mean: digits?")
        assert err.count("\n") == 1
