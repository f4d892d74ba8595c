"""``zoo recipes``: list, show, copies and differences; ``zoo finetune`` without a recipe."""

import json
from pathlib import Path

import pytest

import zoo
from zoo.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipes", "list", "tinynet/*", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["tinynet/tinynet_e-in1k"]["epochs"] == 450
    assert {row["numbers"] for row in rows.values()} == {"paper"}
    code, out, _ = run(capsys, "recipes", "show", "tinynet/tinynet_e-in1k", "optim.lr=0.1")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.count(".") and "'" not in line}
    assert lines["optim.lr"][-2:] == ["0.1", "override"]
    assert lines["augment.smoothing"][-2:] == ["base:", "ours"]
    assert "Published: top-1 59.9 %" in out
    code, _, err = run(capsys, "recipes", "list", "tinynett/*")
    assert code == 2
    assert err.startswith("zoo: No recipe matches 'tinynett/*'. Did you mean: ")


def test_a_copy_is_whole_and_differs_by_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.toml"
    code, out, _ = run(capsys, "recipes", "copy", "lowformer/lowformer_b3-in1k", target, "optim.lr=1e-3")
    assert (code, out.strip()) == (0, str(target))
    assert zoo.load_recipe(target) == zoo.load_recipe("lowformer/lowformer_b3-in1k", ["optim.lr=1e-3"])
    code, out, _ = run(capsys, "recipes", "diff", "lowformer/lowformer_b3-in1k", target, "--json")
    assert json.loads(out) == [{"key": "optim.lr", "left": 9.4e-5, "right": 1e-3}]
    code, _, err = run(capsys, "recipes", "copy", "quickstart", target)
    assert (code, err) == (2, f"zoo: {target} exists; expected the name of a new file.\n")


def test_check_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('# zoo train broken\n\n[model]\nname = "tinynet_f"\n\n[data]\nname = "digits"\n')
    code, out, _ = run(capsys, "recipes", "check", broken, "quickstart")
    assert code == 1
    assert out.splitlines()[0].startswith(f"{broken}: Unknown model 'tinynet_f'. Did you mean: tinynet_")
    assert out.splitlines()[1] == "2 recipes, 1 problems"
    broken.write_text('[model]\nname = "tinynet_e"\n\n[data]\nname = "digits"\n')
    code, out, _ = run(capsys, "recipes", "check", broken)
    assert "has no header" in out


def test_finetune_without_a_recipe(class_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "finetune", "efficientvit_m0.zoo_cifar10", "train.batch_size=4", "--data", class_folder, "--show"
    )
    assert code == 0
    assert 'name = "efficientvit_m0.zoo_cifar10"' in out
    assert "batch_size = 4" in out
    code, _, err = run(capsys, "finetune", "efficientvit_m0")
    assert (code, err.startswith("zoo: 'efficientvit_m0' is a model; expected --data with it")) == (2, True)
