"""zoo.pretrained.source: weights that lie in a folder, in a file or on the Hub, in each layout of config.json."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.atomic import save_safetensors
from zoo.config import ModelConfig
from zoo.errors import ConfigError, UnknownModelError, WeightsError
from zoo.pretrained.convert import convert_file, to_authors
from zoo.pretrained.files import read_header
from zoo.pretrained.hub import write_repository
from zoo.pretrained.source import find_weights
from zoo.train.run_folder import ModelRecord, RunFolder

M0 = "efficientvit_m0"
TINY = {"depths": [1, 1, 1], "widths": [16, 24, 32], "num_heads": [2, 2, 2], "img_size": 32}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small EfficientViT for four classes."""
    return zoo.create_model(M0, **TINY, num_classes=4).eval()


@pytest.fixture
def folder(tmp_path: Path, model: nn.Module) -> Path:
    """The same as timm would have it on the Hub."""
    config = {
        "architecture": "zoo_efficientvit_m0",
        "num_classes": 4,
        "label_names": ["a", "b", "c", "d"],
        "model_args": TINY,
        "pretrained_cfg": {
            "tag": "mine",
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "license": "mit",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert actual.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in actual.state_dict().items())


def edit(folder: Path, **changes: Any) -> None:
    """Change a config.json; None removes a key."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_local_folder_in_timms_layout(folder: Path, model: nn.Module) -> None:
    loaded = zoo.create_model(f"local-dir:{folder}")
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert loaded.pretrained_cfg["label_names"] == ("a", "b", "c", "d")
    assert loaded.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert loaded.pretrained_cfg["license"] == "mit"
    weights = find_weights(f"local-dir:{folder}")
    assert (weights.name, weights.licence, weights.preprocessing.crop_pct) == (f"{M0}.mine", "mit", 0.9)


def test_options_of_create_model_apply(folder: Path, model: nn.Module) -> None:
    source = f"local-dir:{folder}"
    wide = zoo.create_model(source, num_classes=7, in_chans=1, img_size=(32, 64))
    assert wide.eval()(torch.zeros(1, 1, 32, 64)).shape == (1, 7)
    assert torch.equal(wide.state_dict()["head.bn.weight"], model.state_dict()["head.bn.weight"])
    assert len(zoo.create_model(source, features_only=True).eval()(torch.zeros(1, 3, 32, 32))) == 3
    assert zoo.create_model(source, dtype=torch.float16).head.linear.weight.dtype == torch.float16
    torch.manual_seed(0)
    fresh = zoo.create_model(source, pretrained=False)
    assert fresh.config == model.config
    assert not torch.equal(fresh.head.linear.weight, model.head.linear.weight)
    another = zoo.create_model(source, checkpoint=folder / "model.safetensors")
    assert_same(another, model)
    assert_same(zoo.create_model(M0, checkpoint=source, **TINY, num_classes=4), model)


def test_timms_own_repositories_and_their_older_layout(folder: Path) -> None:
    state = zoo.create_model("tinynet_e").state_dict()
    save_safetensors(state, folder / "model.safetensors")
    legacy = {"architecture": "tinynet_e", "num_classes": 1000, "input_size": [3, 106, 106], "crop_pct": 0.875}
    (folder / "config.json").write_text(json.dumps(legacy))
    loaded = zoo.create_model(f"local-dir:{folder}")
    assert torch.equal(loaded.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    assert loaded.config == zoo.get_config("tinynet_e")
    assert find_weights(f"local-dir:{folder}").labels == "imagenet-1k"


def test_classes_size_and_channels_come_from_the_config(folder: Path) -> None:
    cfg = {"input_size": [1, 64, 96]}
    edit(folder, model_args=None, num_classes=3, label_names={"0": "a", "2": "c"}, pretrained_cfg=cfg)
    weights = find_weights(f"local-dir:{folder}")
    assert weights.model_config == zoo.get_config(M0).override(in_chans=1, num_classes=3, img_size=(64, 96))
    assert weights.labels == ("a", "1", "c")
    assert weights.licence == "unknown"


def test_run_folder(tmp_path: Path, model: nn.Module) -> None:
    run = RunFolder(tmp_path)
    record = ModelRecord(
        "efficientvit_m0.r224_in1k", model.config, zoo.get_weights(M0).preprocessing, ("a", "b", "c", "d")
    )
    record.write(run)
    save_safetensors(model.state_dict(), run.weights)
    assert_same(zoo.create_model(f"local-dir:{tmp_path}"), model)
    assert find_weights(f"local-dir:{tmp_path}").labels == ("a", "b", "c", "d")


def test_file_whose_header_names_the_model(tmp_path: Path, model: nn.Module) -> None:
    source, target = tmp_path / "theirs.pth", tmp_path / "mine.safetensors"
    torch.save({"model": to_authors(model.state_dict(), M0, **TINY, num_classes=4)}, source)
    convert_file(source, target, M0, **TINY, num_classes=4)
    assert_same(zoo.create_model(str(target)), model)
    metadata = read_header(target)["__metadata__"]
    assert metadata["model"] == M0
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    save_safetensors({}, target, {"model": M0, "config": '{"img_size": [64, 96]}'})
    assert find_weights(target).preprocessing.img_size == (64, 96)
    save_safetensors(model.state_dict(), target)
    with pytest.raises(WeightsError, match=r"its header names no model; name it: create_model\(NAME, checkpoint="):
        zoo.create_model(str(target))


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("hf-hub:owner", WeightsError, "expected owner/name or owner/name@revision"),
        ("hf-hub:owner/name@", WeightsError, "expected owner/name"),
        ("hf-hub:../name", WeightsError, "expected owner/name"),
        ("hf-hub:owner/name@../../x", WeightsError, "expected owner/name"),
        ("local-dir:/nowhere", WeightsError, r"/nowhere: no config\.json there"),
        ("nowhere.safetensors", WeightsError, r"nowhere\.safetensors: no such file"),
        ("https://example.com/m.safetensors", WeightsError, "add the hash of the file, #sha256="),
        ("https://example.com/m.safetensors#sha256=12", WeightsError, "add the hash of the file, #sha256="),
        (f"http://example.com/m.safetensors#sha256={'0' * 64}", WeightsError, "expected an https address"),
    ],
)
def test_sources_that_are_none(source: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        zoo.create_model(source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "zoo_efficientvit_n0"}, "Unknown model 'efficientvit_n0'. Did you mean"),
        ({"architecture": "resnet50"}, "Unknown model 'resnet50'"),
        ({"architecture": 3}, "does not describe a model of zoo's"),
        ({"architecture": None}, "has none of architecture, model_type, preprocessing"),
        ({"model_args": {"depth": 3}}, r"has no field 'depth'\. Did you mean: depths"),
        ({"model_args": {"depths": [10**9, 1, 1]}}, "depths is 1000000000; expected at most 1024"),
        (
            {"model_args": {"widths": [10**12, 1, 1]}},
            "widths",
        ),
        ({"model_args": [1]}, "does not describe a model of zoo's"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": 10**10}, "expected at most"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode is 'border'"),
        ({"pretrained_cfg": {"input_size": [3]}}, "does not describe a model of zoo's"),
        ({"pretrained_cfg": {"mean": ["a", "b", "c"]}}, "does not describe a model of zoo's"),
        ({"pretrained_cfg": 3}, "does not describe a model of zoo's"),
        ({"architecture": None, "model_type": "llama"}, "Unknown family 'llama'"),
        ({"architecture": None, "preprocessing": {}}, "does not describe a model of zoo's"),
    ],
)
def test_descriptions_that_are_wrong(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises((WeightsError, UnknownModelError, ConfigError), match=message) as raised:
        zoo.create_model(f"local-dir:{folder}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff", '{"architecture"'])
def test_descriptions_that_are_no_json(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"config\.json: (cannot be read as JSON|expected a JSON object)"):
        zoo.create_model(f"local-dir:{folder}")


def test_weights_of_another_model_than_described(folder: Path) -> None:
    edit(folder, model_args={**TINY, "depths": [2, 1, 1]})
    with pytest.raises(WeightsError, match="does not fit efficientvit_m0: 0 unused"):
        zoo.create_model(f"local-dir:{folder}")


# Text: transformers' layout.


@dataclass(frozen=True, kw_only=True)
class ToyTextConfig(ModelConfig):
    vocab_size: int = 11
    hidden_size: int = 8
    layer_types: tuple[str, ...] = ("linear", "linear")


class ToyText(nn.Module):
    def __init__(self, config: ToyTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in config.layer_types)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)


def toytext_small() -> ToyTextConfig:
    return ToyTextConfig()


@pytest.fixture
def toytext(monkeypatch: pytest.MonkeyPatch) -> None:
    family = registry.Family(
        "toytext",
        config=ToyTextConfig,
        model=ToyText,
        title="ToyText",
        paper="-",
        code="-",
        licence="mit",
        task="text-generation",
    )
    family.variant(toytext_small)
    monkeypatch.setitem(registry._registered, "toytext", family)


def test_text_models_are_described_as_transformers_does(toytext: None, tmp_path: Path) -> None:
    model = zoo.create_model("toytext_small", hidden_size=16)
    file = tmp_path / "mine.safetensors"
    save_safetensors(
        model.state_dict(), file, {"model": "toytext_small", "licence": "mit", "config": '{"hidden_size": 16}'}
    )
    written = tmp_path / "written"
    write_repository(str(file), written)
    values = json.loads((written / "config.json").read_text())
    assert values["model_type"] == "toytext"
    assert (values["hidden_size"], values["vocab_size"]) == (16, 11)
    edit(written, architectures=["ToyTextForCausalLM"], transformers_version="5.23.0", dtype="float32")
    loaded = zoo.create_model(f"local-dir:{written}")
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert "pipeline_tag: text-generation" in (written / "README.md").read_text()
