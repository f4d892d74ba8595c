"""``zoo weights``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import main
from zoo.pretrained import files, manifest
from zoo.pretrained.convert import to_authors

CIFAR = "efficientvit_m0.zoo_cifar10"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """``run(*arguments)``: what ``zoo weights`` prints, and with which status it exits."""

    def call(*arguments: str) -> tuple[str, int]:
        with pytest.raises(SystemExit) as exit_:
            main(["weights", *arguments])
        captured = capsys.readouterr()
        return captured.out + captured.err, exit_.value.code or 0

    return call


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for zoo's own part of the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_list(run: Any) -> None:
    out, status = run("list", "efficientvit_m0*")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(rows) == {"efficientvit_m0.r224_in1k", CIFAR, "efficientvit_m0.authors"}
    assert "yes" in rows[CIFAR]
    assert "Hub: timm/efficientvit_m0.r224_in1k" in rows["efficientvit_m0.r224_in1k"]
    for part in ("authors", "mit", "63.2", "Cream", "https://github.com/xinyuliu-jeffrey/"):
        assert part in rows["efficientvit_m0.authors"]


def test_list_as_json_holds_every_entry(run: Any) -> None:
    rows = json.loads(run("list", "--json")[0])
    assert {row["name"] for row in rows} == {entry.name for entry in zoo.list_weights()}
    assert all(row["licence"] and row["place"] and row["layout"] for row in rows)
    mit = json.loads(run("list", "--json", "--licence", "mit")[0])
    assert 0 < len(mit) < len(rows)
    assert {row["licence"] for row in mit} == {"mit"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("list", "resnet*"), "No weights match"),
        (("list", "--licence", "mti"), "Did you mean: mit"),
        (("download", "efficientvit_m9"), "Did you mean"),
        (("download", "efficientvit_m0.authors"), "zoo weights convert efficientvit_m0.authors"),
        (("convert", "efficientvit_m0"), "give --source FILE"),
        (("convert", "efficientvit_m0", "--source", "m0.pth"), "Give --out FILE"),
        (("convert", CIFAR), "Give --out FILE"),
        (("convert", "efficientvit_m0", "classes", "--source", "a", "--out", "b"), "expected FIELD=VALUE"),
        (("convert", "efficientvit_m0", "--source", "nowhere.pth", "--out", "b"), "nowhere.pth: no such file"),
        (("convert", "efficientvit_m0.authors"), "HF_HUB_OFFLINE is set"),
        (("push", "efficientvit_m9", "owner/mine"), "Did you mean"),
        (("cache", "--remove", "efficientvit_m5.r224_in1k"), "is not in the cache"),
        (("cache", "--remove", CIFAR), "is not in the cache"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, run: Any, home: Path) -> None:
    out, status = run(*arguments)
    assert status == 2
    assert message in out
    assert out.count("\n") == 1


def test_download_of_packaged_weights(run: Any) -> None:
    out, status = run("download", CIFAR)
    assert (out.strip(), status) == (str(ROOT / "weights" / f"{CIFAR}.safetensors"), 0)


def test_verify(run: Any, tmp_path: Path) -> None:
    out, status = run("verify", CIFAR)
    assert status == 0
    assert "sha256, 693 keys and shapes, finite values, outputs" in out

    state = load_file(ROOT / "weights" / f"{CIFAR}.safetensors")
    config = {"model": "efficientvit_m0", "config": '{"num_classes": 10, "img_size": 64}'}
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(state, good, config)
    save_file({name: tensor for name, tensor in state.items() if name != "head.bn.bias"}, bad, config)
    rows = json.loads(run("verify", str(good), str(bad), "efficientvit_m1", "--json")[0])
    assert [row["ok"] for row in rows] == [True, False, False]
    assert "head.bn.bias" in rows[1]["reason"]
    assert "HF_HUB_OFFLINE" in rows[2]["reason"]
    assert run("verify", str(bad))[1] == 1


def test_verify_notices_other_outputs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo.get_weights(CIFAR)
    text = (ROOT / "weights" / "efficientvit.toml").read_text().replace(str(entry.check[0]), str(entry.check[0] + 0.01))
    (tmp_path / "efficientvit.toml").write_text(text)
    (tmp_path / entry.file).write_bytes(entry.path.read_bytes())
    monkeypatch.setattr(manifest, "folder", lambda name: tmp_path)
    out, status = run("verify", CIFAR)
    assert status == 1
    assert "outputs differ from those recorded by 0.01" in out


def test_convert_there_and_back(run: Any, home: Path, tmp_path: Path) -> None:
    state = zoo.create_model("efficientvit_m0", num_classes=10).state_dict()
    source, ours, theirs = tmp_path / "m0.pth", tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    torch.save({"model": to_authors(state, "efficientvit_m0", num_classes=10)}, source)
    out, status = run("convert", "efficientvit_m0", "num_classes=10", "--source", str(source), "--out", str(ours))
    assert (out.strip(), status) == (str(ours), 0)
    written = load_file(ours)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    arguments = ("num_classes=10", "--source", str(ours), "--out", str(theirs), "--to", "authors")
    assert run("convert", "efficientvit_m0", *arguments)[1] == 0
    assert "blocks1.0.mixer.m.attn.qkvs.0.c.weight" in load_file(theirs)
    assert run("convert", "efficientvit_m0", *arguments[:-1], "timm")[1] == 2


def test_weights_published_as_a_pickle_are_converted_once(run: Any, home: Path, tmp_path: Path) -> None:
    name = "efficientvit_m0.authors"
    state = zoo.create_model("efficientvit_m0").state_dict()
    torch.save({"model": to_authors(state, "efficientvit_m0")}, tmp_path / "m0.pth")
    with pytest.raises(zoo.WeightsError, match=f"converted once before it is loaded. zoo weights convert {name}"):
        zoo.create_model(name, pretrained=True)
    out, status = run("convert", name, "--source", str(tmp_path / "m0.pth"))
    assert (out.strip(), status) == (str(files.cache_folder("converted") / f"{name}.safetensors"), 0)
    model = zoo.create_model(name, pretrained=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert "finite values" in run("verify", name)[0]
    (row,) = json.loads(run("cache", "--json")[0])
    assert row["name"] == name
    assert "0.0 MB in all" in run("cache", "--remove", name)[0]


def test_push_dry_run(run: Any, tmp_path: Path) -> None:
    out, status = run("push", CIFAR, "owner/mine", "--dry-run", str(tmp_path / "repo"))
    assert (out.strip(), status) == (str(tmp_path / "repo"), 0)
    assert {path.name for path in (tmp_path / "repo").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert zoo.create_model(f"local-dir:{tmp_path / 'repo'}").num_classes == 10
