"""zoo.pretrained.hub: what push writes, zoo and timm load again, with the real client and over the Hub's protocol."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import zoo
from zoo.atomic import save_safetensors
from zoo.builders import Stage, anynet, overrides
from zoo.errors import WeightsError
from zoo.pretrained.hub import write_repository
from zoo.train.run_folder import ModelRecord, RunFolder

CIFAR = "efficientvit_m0.zoo_cifar10"

ROUND_TRIP = """
import os, timm, torch, zoo.integrations.timm
from zoo.pretrained.hub import push
url = push({source!r}, "owner/mine")
assert url.startswith(os.environ["HF_ENDPOINT"] + "/owner/mine/commit/"), url
commit = url.rpartition("/")[2]
zoo.integrations.timm.register()
original = zoo.create_model({source!r}, pretrained=True).eval()
models = {{
    "zoo": zoo.create_model("hf-hub:owner/mine"),
    "zoo, pinned": zoo.create_model("hf-hub:owner/mine@" + commit),
    "timm": timm.create_model("hf-hub:owner/mine", pretrained=True),
    "timm, pinned": timm.create_model("hf-hub:owner/mine@" + commit, pretrained=True),
    "timm, other classes": timm.create_model("hf-hub:owner/mine", pretrained=True, num_classes=3),
}}
images = torch.randn(1, *original.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    for name, model in models.items():
        for key in ("mean", "std", "input_size", "pool_size"):
            assert tuple(model.pretrained_cfg[key]) == tuple(original.pretrained_cfg[key]), (name, key)
        # Files of the cache are mapped: weights lie at any address, and kernels round otherwise on unaligned memory.
        same = lambda left, right: torch.allclose(left, right, rtol=1e-5, atol=1e-7)
        weights = original.state_dict()
        assert all(each.equal(weights[key]) for key, each in model.state_dict().items() if "head" not in key), name
        assert same(model.eval().forward_features(images), original.forward_features(images)), name
        if name != "timm, other classes":
            assert same(model(images), original(images)), name
            assert tuple(model.pretrained_cfg["label_names"]) == tuple(original.pretrained_cfg["label_names"])
print("same")
"""


def test_pushed_weights_load_in_zoo_and_in_timm(hub: Any, client: Any) -> None:
    assert client.run(ROUND_TRIP.format(source=CIFAR)) == "same"
    files = hub.commits["owner/mine"][hub.branches["owner/mine"]["main"]]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert not hub.downloads()[0].startswith("/api")


SMALL = {"depths": (1, 1, 1), "widths": (16, 24, 32), "num_heads": (2, 2, 2)}
HAND_WRITTEN = overrides(anynet([Stage("mbconv", 1, 16), Stage("modulation", 1, 24, expand_ratio=2)]))


@pytest.mark.parametrize("name, sizes", [("efficientvit_m0", SMALL), ("anynet", HAND_WRITTEN)])
def test_a_run_folder_with_another_architecture(
    name: str, sizes: dict[str, Any], hub: Any, client: Any, tmp_path: Path
) -> None:
    model: Any = zoo.create_model(name, **{**sizes, "img_size": (32, 64), "in_chans": 1}, num_classes=3)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    preprocessing = zoo.preprocessing.Preprocessing(img_size=(32, 64), mean=(0.5,), std=(0.25,))
    ModelRecord(name, model.config, preprocessing, ("x", "y", "z")).write(run)
    save_safetensors(model.state_dict(), run.weights)
    code = ROUND_TRIP.format(source=f"local-dir:{run.path}").replace(
        '"owner/mine")\nassert', '"owner/mine", licence="mit")\nassert'
    )
    assert client.run(code.replace("num_classes=3", "num_classes=5")) == "same"


def test_config_is_timms_and_the_card_says_what_it_is(tmp_path: Path) -> None:
    write_repository(CIFAR, tmp_path, repo="owner/mine")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "zoo_efficientvit_m0"
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (10, 192, "avg")
    assert config["label_names"][:2] == ["airplane", "automobile"]
    assert config["model_args"] == {"img_size": 64}
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["classifier"]) == ([3, 64, 64], 1.0, "head.linear")
    assert not cfg.keys() & {"file", "url", "hf_hub_id", "hf_hub_filename", "architecture", "label_names"}
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "zoo",
        "image-classification",
    )
    assert card.data.eval_results[0].metric_value == 76.56
    for part in (
        'zoo.create_model("hf-hub:owner/mine")',
        'timm.create_model("hf-hub:owner/mine"',
        "arXiv:2305.07027",
        "2.16 M",
    ):
        assert part in card.text


def test_licence_must_be_known(tmp_path: Path) -> None:
    write_repository(CIFAR, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    del values["pretrained_cfg"]["license"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="does not say under which licence"):
        write_repository(f"local-dir:{tmp_path / 'a'}", tmp_path / "b")
    write_repository(f"local-dir:{tmp_path / 'a'}", tmp_path / "b", licence="cc0-1.0")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["pretrained_cfg"]["license"] == "cc0-1.0"


PUSH = f"""
from zoo.pretrained.hub import push
print(push("{CIFAR}", "owner/mine"))
"""


@pytest.mark.parametrize(
    "path, status, headers, message",
    [
        ("/api/repos/create", 401, {}, "refused (401)|no such repository"),
        ("/api/repos/create", 403, {"X-Error-Message": "You may not"}, "access is refused (403)"),
        ("/preupload/", 403, {}, "access is refused (403)"),
        ("/commit/", 500, {}, "the server answers 500"),
    ],
)
def test_refused_pushes_say_why(
    path: str, status: int, headers: dict[str, str], message: str, hub: Any, client: Any
) -> None:
    hub.fail(path, method="POST", status=status, headers=headers, times=100)
    out = client.run(PUSH)
    assert out.startswith("refused: Cannot push to the Hub repository owner/mine: "), out
    assert any(part in out for part in message.split("|"))
    assert "\n" not in out
