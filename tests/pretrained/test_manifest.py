"""zoo.pretrained.manifest: the manifests of the repository, and what is refused in one."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import zoo
from zoo.errors import UnknownModelError, WeightsError
from zoo.preprocessing import IMAGENET_MEAN
from zoo.pretrained import manifest
from zoo.registry import get_config, is_model, list_models, split_name

ENTRY = """
[efficientvit_m0.test]
licence = "mit"
layout = "zoo"
"""


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``weights/`` folder in place of the repository's."""
    monkeypatch.setattr(manifest, "folder", lambda name: tmp_path)
    return tmp_path


@pytest.mark.parametrize("entry", manifest.list_weights(), ids=lambda entry: entry.name)
def test_entry_describes_a_model_that_exists(entry: manifest.Weights) -> None:
    assert is_model(entry.name)
    config = get_config(entry.name)  # its config fields fit
    assert config.to_dict().items() >= dict(entry.config).items()
    assert entry.licence
    if not entry.tokenizer:  # of the language models' figures none is recorded
        assert entry.metrics or entry.labels == "imagenet-12k"  # for pretraining: nobody publishes an accuracy
        assert all(0 < metric.top1 <= 100 for metric in entry.metrics if metric.top1 is not None)
    assert all(metric.source and metric.words for metric in entry.metrics)
    if entry.packaged:
        assert entry.path.is_file()
        assert entry.sha256
        assert entry.recipe


@pytest.mark.parametrize("name", [f"efficientvit_m{i}" for i in range(6)])
def test_default_is_timms_file_on_the_hub(name: str) -> None:
    weights = zoo.get_weights(name)
    assert weights == zoo.get_weights(f"{name}.r224_in1k")
    assert (weights.hub, weights.file, weights.revision) == (f"timm/{name}.r224_in1k", "model.safetensors", "main")
    assert not weights.packaged
    assert weights.label_names is None
    assert weights.preprocessing.img_size == (224, 224)
    assert weights.preprocessing.mean == IMAGENET_MEAN


def test_metrics_quote_the_authors_first() -> None:
    authors, timm = zoo.get_weights("efficientvit_m5").metrics
    assert (authors.top1, authors.top5) == (77.1, 93.4)
    assert (timm.top1, timm.top5) == (77.092, 93.168)
    assert "Cream" in authors.source
    assert "timm" in timm.source


def test_list_models_pretrained() -> None:
    names = list_models("efficientvit*", pretrained=True)
    assert "efficientvit_m5.r224_in1k" in names
    assert all(split_name(name)[1] for name in names)


def test_every_tag_of_every_manifest_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli import app

    written = set()
    for path in (Path(__file__).parents[2] / "weights").glob("*.toml"):
        document = tomllib.loads(path.read_text())
        written |= {f"{model}.{tag}" for model, tags in document.items() if model != "defaults" for tag in tags}
    app(["list", "--pretrained", "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == written
    assert len(rows) == len(written) > 80


def test_unknown_tag_names_those_there_are() -> None:
    with pytest.raises(WeightsError, match=r"no weights tagged 'r224_in1'; it has: r224_in1k.*Did you mean: r224_in1k"):
        zoo.get_weights("efficientvit_m3.r224_in1")
    with pytest.raises(WeightsError, match=r"lowformer_b1 has no weights tagged '5'.*Did you mean: lowformer_b15\?"):
        zoo.get_weights("lowformer_b1.5")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean: efficientvit_m4"):
        zoo.get_weights("efficientvit_n4")


def test_model_without_weights(weights_folder: Path) -> None:
    with pytest.raises(WeightsError, match="efficientvit_m0 has no pretrained weights"):
        zoo.get_weights("efficientvit_m0")
    assert zoo.list_weights() == []


def test_packaged_entry(weights_folder: Path) -> None:
    (weights_folder / "efficientvit.toml").write_text(
        ENTRY
        + f"""
file = "m0.safetensors"
sha256 = "{"0" * 64}"
config = {{ num_classes = 3, img_size = 64 }}
labels = ["cat", "dog", "frog"]
preprocessing = {{ img_size = 64, crop_pct = 1.0 }}
recipe = "quickstart"
metrics = [{{ dataset = "pets", top1 = 90, source = "here" }}]
"""
    )
    weights = zoo.get_weights("efficientvit_m0")
    assert weights.packaged
    assert weights.path == weights_folder / "m0.safetensors"
    assert weights.label_names == ("cat", "dog", "frog")
    assert weights.preprocessing.img_size == (64, 64)
    assert weights.metrics[0].top5 is None
    assert get_config("efficientvit_m0.test") == get_config("efficientvit_m0").override(num_classes=3, img_size=64)


def test_first_tag_is_the_default_and_tables_merge(weights_folder: Path) -> None:
    (weights_folder / "efficientvit.toml").write_text(
        """
[defaults]
licence = "mit"
layout = "zoo"
preprocessing = { crop_pct = 0.9, interpolation = "bilinear" }
[efficientvit_m0.second]
preprocessing = { crop_pct = 1.0 }
[efficientvit_m0.first]
"""
    )
    assert [entry.tag for entry in zoo.list_weights("efficientvit_m0")] == ["second", "first"]
    second = zoo.get_weights("efficientvit_m0")
    assert second.tag == "second"
    assert (second.preprocessing.crop_pct, second.preprocessing.interpolation) == (1.0, "bilinear")


@pytest.mark.parametrize(
    "text, message",
    [
        (ENTRY + 'licenze = "mit"', r"efficientvit_m0\.test: unknown key 'licenze'\. Did you mean: licence"),
        (ENTRY + "family = 'x'", "unknown key 'family'"),
        ('[efficientvit_m0.test]\nlayout = "zoo"', "the key 'licence' is missing"),
        (ENTRY + 'file = "../m0.safetensors"', r"file is '\.\./m0\.safetensors'; expected the name"),
        (ENTRY + 'file = "a/m0.safetensors"', "expected the name"),
        (ENTRY + r"file = 'a\m0.safetensors'", "expected the name"),
        (ENTRY + 'file = "m0.npz"', "expected the name of a .safetensors"),
        (ENTRY + 'file = "m0.pth"', "a packaged file is never a pickle"),
        (ENTRY + 'hub = "a/b"\nurl = "https://a.b/c.pth"', "hub and url are given; expected one place"),
        (ENTRY + 'url = "http://a.b/c.pth"\nfile = "c.pth"', "expected an https address"),
        (ENTRY + 'page = "https://a.b/ c"', "expected an https address"),
        (ENTRY + 'url = "https://a.b/c.safetensors"', "sha256 is ''; expected that of the file"),
        (ENTRY + 'hub = "../b"', "expected owner/name"),
        (ENTRY + 'hub = "a/.."', "expected owner/name"),
        (ENTRY + 'hub = "a/b"\nrevision = "../../x"', "expected a branch, tag or commit"),
        (ENTRY + 'sha256 = "abc"', "64 hexadecimal digits"),
        (ENTRY + "sha256 = 7", "sha256 is 7; expected a string"),
        (ENTRY + 'hub = "timm"', "expected owner/name"),
        (ENTRY.replace('"zoo"', '"flax"'), "layout is 'flax'; expected 'timm' or 'zoo' or 'authors'"),
        (ENTRY + 'labels = "imagenet"', "expected a list of class names, or 'imagenet-1k'"),
        (ENTRY + 'labels = ["a"]\nconfig = { num_classes = 2 }', "one name for each of config.num_classes = 2"),
        (ENTRY + "config = 3", "config is 3; expected a table"),
        (ENTRY + "preprocessing = { crop = 1.0 }", "preprocessing has no key 'crop'. Did you mean: crop_pct"),
        (ENTRY + "preprocessing = { crop_pct = 2.0 }", "crop_pct is 2.0"),
        (ENTRY + 'metrics = [{ dataset = "d", top1 = 1.0 }]', "the key 'source' is missing"),
        (ENTRY + 'metrics = [{ dataset = "d", top1 = "1", source = "s" }]', "top1 is '1'; expected a number"),
        (ENTRY + "metrics = [3]", "3 is no table"),
        ("[efficientvit_m0.Test-1]\n", "lower-case letters"),
        ("efficientvit_m0 = 3", "must be a table of tags"),
        ("[efficientvit_m0.test", "cannot be read as TOML"),
    ],
)
def test_malformed_manifest(weights_folder: Path, text: str, message: str) -> None:
    (weights_folder / "efficientvit.toml").write_text(text)
    with pytest.raises(WeightsError, match=message) as raised:
        zoo.list_weights()
    assert "efficientvit.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_listing_weights_imports_neither_torch_nor_the_hub_client() -> None:
    code = "import sys, zoo; zoo.list_weights(); sys.exit(any(m in sys.modules for m in ('torch', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
