"""zoo's models through timm's own functions. timm's test suite is run in ``test_timm_suite.py``."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import zoo
import zoo.integrations.timm
from zoo import registry
from zoo.families.efficientvit import EfficientViTConfig
from zoo.integrations.timm import register
from zoo.models.efficientvit import EfficientViT
from zoo.pretrained.convert import to_authors
from zoo.registry import Family

MODELS = zoo.list_models(task="image-classification")
NAME = "zoo_efficientvit_m0"


@dataclass(frozen=True, kw_only=True)
class FinchConfig(EfficientViTConfig):
    """Another package's config."""


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


@pytest.fixture
def finch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randomise: Callable) -> Family:
    """Another package's family, with weights for 64 px and 10 classes beside its manifest."""
    manifest = tmp_path / "finch.toml"
    manifest.write_text(
        """
        [finch_s.r64_birds]
        file = "finch_s.safetensors"
        licence = "cc0-1.0"
        layout = "zoo"
        config = { img_size = 64, num_classes = 10 }
        preprocessing = { img_size = 64, crop_pct = 1.0, interpolation = "bilinear" }
        labels = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
        """
    )
    family = Family(
        "finch",
        config=FinchConfig,
        model=EfficientViT,
        title="Finch",
        paper="",
        code="example.org/finch",
        licence="MIT",
        first_conv="patch_embed.conv1.conv",
        classifier="head.linear",
        weights=manifest,
    )

    @family.variant
    def finch_s() -> FinchConfig:
        return FinchConfig(depths=(1, 1, 1))

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    zoo.register(family)
    model = randomise(zoo.create_model("finch_s.r64_birds"))
    save_file(model.state_dict(), tmp_path / "finch_s.safetensors")
    return family


def images(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_names() -> None:
    names = timm.list_models("zoo_*")
    assert set(names) >= {f"zoo_{name}" for name in MODELS}
    assert "efficientvit_m0" in timm.list_models(exclude_filters="zoo_*")
    assert type(timm.create_model("efficientvit_m0")).__module__.startswith("timm.")
    assert type(timm.create_model(NAME)) is EfficientViT
    assert all(hasattr(zoo.integrations.timm, name) for name in zoo.integrations.timm.__all__)


def test_registering_again_changes_nothing() -> None:
    before = {name: timm.model_entrypoint(name) for name in timm.list_models("zoo_*")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # timm warns when a name is overwritten
        names = register()
    assert set(names) == {f"zoo_{name}" for name in MODELS}
    assert {name: timm.model_entrypoint(name) for name in timm.list_models("zoo_*")} == before


def test_a_name_that_is_not_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def zoo_heron(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return torch.nn.Identity()

    timm.models.register_model(zoo_heron)
    monkeypatch.setattr("zoo.integrations.timm.list_models", lambda **_: ["heron"])
    with pytest.raises(zoo.ConfigError, match=r"timm has a model 'zoo_heron' already, from .*test_timm_bridge"):
        register()
    assert timm.model_entrypoint("zoo_heron") is zoo_heron


@pytest.mark.parametrize("name", MODELS)
def test_same_description_as_zoos(name: str) -> None:
    default = next((weights.name for weights in zoo.list_weights(name)), name)  # what timm takes a bare name for
    ours = zoo.create_model(default).pretrained_cfg
    theirs = timm.create_model(f"zoo_{name}").pretrained_cfg
    assert {**theirs, "architecture": name} == ours


def test_tags() -> None:
    weights = zoo.get_weights("efficientvit_m0.r224_in1k")
    cfg = timm.get_pretrained_cfg(f"{NAME}.r224_in1k")
    assert timm.get_pretrained_cfg(NAME) == cfg  # the first is the default
    assert cfg.hf_hub_id == f"{weights.hub}@{weights.revision}"
    assert cfg.hf_hub_filename == weights.file
    assert cfg.license == weights.licence
    assert timm.is_model_pretrained(f"{NAME}.r224_in1k")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(f"{NAME}.r225_in1k")


def test_keywords_are_config_fields() -> None:
    changes = {"num_classes": 3, "in_chans": 4, "drop_path_rate": 0.1, "widths": (32, 64, 96)}
    model = timm.create_model(NAME, img_size=(64, 64), global_pool="max", drop_rate=None, **changes)
    assert model.config == zoo.get_config("efficientvit_m0").override(img_size=64, global_pool="max", **changes)
    assert timm.create_model(NAME, img_size=(64, 96)).config.img_size == (64, 96)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'drop_path'\. Did you mean: drop_"):
        timm.create_model(NAME, drop_path=0.1)
    with pytest.raises(zoo.ConfigError, match="does not divide"):
        timm.create_model(NAME, num_heads=(4, 4, 5))


def test_device_and_dtype() -> None:
    model = timm.create_model(NAME, device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "dict", "hook", "fx"])
def test_features(feature_cls: str | None, randomise: Callable) -> None:
    model = randomise(timm.create_model(NAME))
    net = timm.create_model(NAME, features_only=True, feature_cls=feature_cls, out_indices=(0, 2)).eval()
    # The extractors keep the model, or its parts under names such as stages_0, in order and up to the last level.
    for own, given in zip(net.state_dict().values(), model.state_dict().values(), strict=False):
        own.copy_(given)
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
        maps = net(images())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert len(maps) == 2
    for actual, level in zip(maps, expected, strict=True):
        assert torch.equal(actual, level)
    assert net.feature_info.channels() == [64, 192]
    assert net.feature_info.reduction() == [16, 64]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_scripted_feature_graph() -> None:
    """timm's ``test_model_forward_torchscript_with_features_fx``, which is of one model of its own."""
    net = timm.create_model(NAME, features_only=True, feature_cfg={"feature_cls": "fx"}).eval()
    scripted = torch.jit.script(net)
    with torch.no_grad():
        for actual, expected in zip(scripted(images(128, 96)), net(images(128, 96)), strict=True):
            assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_script_agrees_at_other_sizes(randomise: Callable) -> None:
    model = randomise(timm.create_model(NAME))
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in [(64, 64), (224, 160)]:
            assert_close(scripted(images(*size)), model(images(*size)))


def test_weights_of_another_package(finch: Family) -> None:
    name = "zoo_finch_s.r64_birds"
    assert "zoo_finch_s" in register()
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.pool_size, cfg.num_classes) == ((3, 64, 64), (1, 1), 10)
    assert (cfg.crop_pct, cfg.interpolation, cfg.label_names) == (1.0, "bilinear", tuple("abcdefghij"))

    model = timm.create_model(name, pretrained=True).eval()
    assert model.config == zoo.get_config("finch_s.r64_birds")
    assert timm.create_model("zoo_finch_s").config == model.config  # the tag is the default one
    with torch.no_grad():
        assert_close(model(images()), zoo.create_model("finch_s", pretrained=True).eval()(images()))

    larger = timm.create_model(name, pretrained=True, img_size=(128, 128))
    assert larger.config.img_size == 128
    fresh_head = timm.create_model(name, pretrained=True, num_classes=5, in_chans=1).eval()
    assert fresh_head(images(channels=1)).shape == (2, 5)
    assert torch.equal(fresh_head.stages[0].blocks[0].dw0.m.conv.weight, model.stages[0].blocks[0].dw0.m.conv.weight)


def test_authors_file_loads(tmp_path: Path, randomise: Callable) -> None:
    model = randomise(zoo.create_model("efficientvit_m0"))
    save_file(to_authors(model.state_dict(), "efficientvit_m0"), tmp_path / "authors.safetensors")
    overlay = {"file": str(tmp_path / "authors.safetensors")}
    loaded = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_timms_own_save_and_load(tmp_path: Path, randomise: Callable) -> None:
    """A model saved in timm's Hub layout is built again from the folder alone, its size included."""
    model = randomise(timm.create_model(NAME, num_classes=3, img_size=(96, 128)))
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(images(96, 128)), model(images(96, 128)))
