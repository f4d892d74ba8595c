"""Finding models by name, and families that other packages bring."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo import registry
from zoo.families.efficientvit import EfficientViTConfig
from zoo.models.efficientvit import EfficientViT
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class ParakeetConfig(EfficientViTConfig):
    """Another package's config."""


def parakeet(name: str = "parakeet", variants: tuple[str, ...] = ("parakeet_s2", "parakeet_s10")) -> Family:
    family = Family(
        name,
        config=ParakeetConfig,
        model=EfficientViT,
        title="Parakeet",
        paper="",
        code="example.org/parakeet",
        licence="MIT",
        first_conv="patch_embed.conv1.conv",
        classifier="head.linear",
    )
    for variant in variants:

        def make_config() -> ParakeetConfig:
            return ParakeetConfig()

        make_config.__name__ = variant
        family.variant(make_config)
    return family


@pytest.fixture(autouse=True)
def _restore_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    registry._load_entry_points.cache_clear()


def test_list_models() -> None:
    names = zoo.list_models()
    assert {"efficientvit_m0", "efficientvit_m5"} <= set(names)
    assert zoo.list_models("efficientvit_m[01]") == ["efficientvit_m0", "efficientvit_m1"]
    assert zoo.list_models(["efficientvit_m5", "*vit_m4"]) == ["efficientvit_m4", "efficientvit_m5"]
    assert zoo.list_models("nothing*") == []
    assert set(zoo.list_models(task="image-classification")) <= set(names)


def test_list_models_with_weights() -> None:
    tagged = [f"efficientvit_m{i}.r224_in1k" for i in range(6)]
    names = zoo.list_models("efficientvit_m*", pretrained=True)
    assert set(tagged) <= set(names)
    assert zoo.list_models("efficientvit_*.r224_in1k", pretrained=True) == tagged
    assert all(zoo.is_model(name) for name in names)


def test_is_model() -> None:
    assert zoo.is_model("efficientvit_m0")
    assert zoo.is_model("efficientvit_m0.r224_in1k")
    assert not zoo.is_model("efficientvit_m0.r225_in1k")
    assert not zoo.is_model("efficientvit_m9")
    assert not zoo.is_model("")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientvit_n4", r"Unknown model 'efficientvit_n4'. Did you mean: efficientvit_m4, "),
        ("efficientvit_m4x.r224_in1k", r"Did you mean: efficientvit_m4"),
        ("gpt", "`zoo list` shows all of them"),
        ("runs/efficientvit_m4.pth", "name the architecture and pass checkpoint=PATH"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(zoo.UnknownModelError, match=message):
        zoo.get_config(name)
    with pytest.raises(zoo.UnknownModelError, match=message):
        zoo.create_model(name)


@pytest.mark.parametrize("name", [None, 5])
def test_names_are_strings(name: Any) -> None:
    with pytest.raises(zoo.UnknownModelError, match="expected a string"):
        zoo.create_model(name)


def test_unknown_task() -> None:
    with pytest.raises(zoo.ConfigError, match=r"task is 'image-clasification'.*Did you mean: image-classification"):
        zoo.list_models(task="image-clasification")


def test_unknown_tag() -> None:
    with pytest.raises(zoo.WeightsError, match="names no weights after the dot"):
        zoo.create_model("efficientvit_m4.")
    with pytest.raises(zoo.WeightsError, match=r"no weights tagged 'r224_in2k'.*Did you mean: r224_in1k"):
        zoo.get_config("efficientvit_m4.r224_in2k")


def test_unknown_field() -> None:
    with pytest.raises(zoo.ConfigError, match=r"no field 'drop_path'. Did you mean: drop_path_rate"):
        zoo.create_model("efficientvit_m0", drop_path=0.1)


def test_another_packages_family() -> None:
    family = parakeet()
    assert zoo.register(family) is family
    assert zoo.register(family) is family  # again: harmless
    assert zoo.list_models("parakeet*") == ["parakeet_s2", "parakeet_s10"]
    assert zoo.list_models("parakeet*", task="image-classification") == ["parakeet_s2", "parakeet_s10"]
    config = zoo.get_config("parakeet_s2")
    assert type(config) is ParakeetConfig
    assert zoo.config_from_json(config.to_json()) == config
    assert zoo.create_model("parakeet_s2", num_classes=3).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(zoo.UnknownModelError, match="Did you mean: parakeet_s2"):
        zoo.get_config("parakeet_s3")


@pytest.mark.parametrize(
    ("name", "variants", "message"),
    [
        ("efficientvit", ("other_s0",), "A family named 'efficientvit' is registered already"),
        ("parakeet", ("parakeet_s7",), "A family named 'parakeet' is registered already"),
        ("other", ("efficientvit_m0",), "Variant 'efficientvit_m0' is registered by family 'efficientvit' already"),
        ("other", ("parakeet_s2",), "Variant 'parakeet_s2' is registered by family 'parakeet' already"),
    ],
)
def test_names_that_are_taken(name: str, variants: tuple[str, ...], message: str) -> None:
    zoo.register(parakeet())
    before = zoo.list_models()
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.register(parakeet(name, variants))
    assert zoo.list_models() == before
    assert registry.family_name("efficientvit_m0") == "efficientvit"


def test_family_from_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's family is found without its being imported by the user."""
    entry = metadata.EntryPoint("parakeet", "parakeet_package:FAMILY", registry.ENTRY_POINTS)
    module = type(sys)("parakeet_package")
    module.FAMILY = parakeet()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parakeet_package", module)
    found = {registry.ENTRY_POINTS: (entry,)}
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: found.get(group, ()))
    registry._load_entry_points.cache_clear()
    assert zoo.list_models("parakeet*") == ["parakeet_s2", "parakeet_s10"]
    assert zoo.get_config("parakeet_s10") == ParakeetConfig()


def test_a_broken_entry_point_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = metadata.EntryPoint("parakeet", "no_such_package:FAMILY", registry.ENTRY_POINTS)
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: (entry,))
    registry._load_entry_points.cache_clear()
    assert "efficientvit_m0" in zoo.list_models()
    assert "The entry point 'parakeet' (no_such_package:FAMILY) gives no family: No module named" in caplog.text


def test_a_family_that_is_no_name() -> None:
    with pytest.raises(zoo.ConfigError, match=r'"family" is \[\]; expected a name'):
        zoo.config_from_json('{"family": []}')
