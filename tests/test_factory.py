"""zoo.create_model and zoo.build: every option, with timm's own model as the oracle."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.atomic import save_safetensors
from zoo.config import ImageConfig
from zoo.errors import ConfigError, UnknownModelError, WeightsError
from zoo.factory import check_device
from zoo.models._backbone import Backbone
from zoo.preprocessing import IMAGENET_MEAN
from zoo.pretrained import manifest
from zoo.pretrained.convert import to_authors

M0 = "efficientvit_m0"


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """timm's M0, with random weights and statistics."""
    torch.manual_seed(0)
    model = timm.create_model(M0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "attention_biases")):
                tensor.normal_(std=0.1)
            elif name.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def file(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's weights as a file."""
    path = tmp_path_factory.mktemp("weights") / "m0.safetensors"
    save_safetensors(original.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two images, ``[2, 3, 224, 224]``."""
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(images)


# Without weights.


def test_build_follows_the_config() -> None:
    config = zoo.get_config(M0).override(depths=(1, 1, 1), num_classes=5)
    model = zoo.build(config, dtype=torch.float64)
    assert model.config == config
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert outputs(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 5)


def test_build_on_the_meta_device() -> None:
    assert all(parameter.is_meta for parameter in zoo.build(zoo.get_config(M0), device="meta").parameters())
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in zoo.create_model(M0).parameters())


def test_meta_model_can_be_initialised() -> None:
    model = zoo.build(zoo.get_config(M0), device="meta").to_empty(device="cpu")
    model.init_weights()
    block = model.stages[0].blocks[0]
    assert torch.equal(block.dw0.m.bn.weight, torch.zeros(64))  # what ConvNorm sets after the batch norm did
    assert 0.01 < model.head.linear.weight.std() < 0.03
    assert outputs(model, torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_overrides_reach_the_config_and_none_is_dropped() -> None:
    model = zoo.create_model(
        M0, num_classes=7, in_chans=1, img_size=(64, 96), drop_path_rate=0.1, drop_rate=0.2, mlp_ratio=None
    )
    assert model.config == zoo.get_config(M0).override(
        num_classes=7, in_chans=1, img_size=(64, 96), drop_path_rate=0.1, drop_rate=0.2
    )
    assert outputs(model, torch.zeros(1, 1, 64, 96)).shape == (1, 7)


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("efficientvit_n4", {}, UnknownModelError, "Unknown model 'efficientvit_n4'. Did you mean: efficientvit_m4"),
        ("weights/m0.pth", {}, UnknownModelError, "checkpoint=PATH"),
        (f"{M0}.r225_in1k", {"pretrained": True}, WeightsError, "no weights tagged 'r225_in1k'; it has: r224_in1k"),
        (f"{M0}.r225_in1k", {}, WeightsError, "it has: r224_in1k"),
        (M0, {"drop_path": 0.1}, ConfigError, "no field 'drop_path'. Did you mean: drop_path_rate"),
        ("mor_2m_r3", {"num_classes": 10}, ConfigError, r"no field 'num_classes'\.($| Did you mean: (?!num_classes))"),
        (M0, {"checkpoint_path": "x"}, ConfigError, "no field 'checkpoint_path'. Did you mean: checkpoint?"),
        (M0, {"num_classes": -1}, ConfigError, "num_classes is -1"),
        (M0, {"num_classes": "10"}, ConfigError, "num_classes is '10'"),
        (M0, {"img_size": 16}, ConfigError, "img_size is 16"),
        (M0, {"pretrained": True, "checkpoint": "a.safetensors"}, ConfigError, "expected one source of weights"),
        (M0, {"out_indices": (0, 1)}, ConfigError, "needs features_only=True"),
        ("matmulfree_370m", {"features_only": True}, ConfigError, "for image models; matmulfree_370m reads text"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        zoo.create_model(name, **options)
    assert "\n" not in str(raised.value)


# With weights.


def test_same_outputs_as_timm_on_the_same_file(original: nn.Module, file: Path, images: Tensor) -> None:
    model = zoo.create_model(M0, checkpoint=file)
    assert model.training
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.allclose(outputs(model, images), outputs(original, images), atol=1e-5)


def test_nothing_is_initialised_only_to_be_overwritten(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    for name in ("uniform_", "normal_", "fill_", "zero_"):
        method = getattr(Tensor, name)

        def record(tensor: Tensor, *args: Any, method: Any = method, **kwargs: Any) -> Tensor:
            if not tensor.is_meta:
                filled.append(tuple(tensor.shape))
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, record)
    zoo.create_model(M0, checkpoint=file)
    assert filled == []
    zoo.create_model(M0, checkpoint=file, num_classes=10)
    assert set(filled) == {(10, 192), (10,), (192,), ()}  # the new head alone


def test_no_tensor_is_left_on_the_meta_device(file: Path) -> None:
    for options in ({}, {"num_classes": 3}, {"num_classes": 0}, {"img_size": 320}, {"dtype": torch.bfloat16}):
        model = zoo.create_model(M0, checkpoint=file, **options)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_authors_layout_loads(original: nn.Module, images: Tensor, tmp_path: Path) -> None:
    theirs = to_authors(original.state_dict(), M0)
    save_safetensors(theirs, tmp_path / "authors.safetensors")
    model = zoo.create_model(M0, checkpoint=tmp_path / "authors.safetensors")
    assert torch.allclose(outputs(model, images), outputs(original, images), atol=1e-5)
    for classes in (0, 10):
        headless = zoo.create_model(M0, checkpoint=tmp_path / "authors.safetensors", num_classes=classes)
        assert torch.equal(outputs(headless, images).isfinite().all(), torch.tensor(True))


def test_other_classes(original: nn.Module, file: Path, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo"):
        model = zoo.create_model(M0, checkpoint=str(file), num_classes=10)
    assert "1000 classes, the model 10" in caplog.text
    assert outputs(model, images).shape == (2, 10)
    assert torch.equal(model.head.bn.running_mean, original.head.bn.running_mean)
    assert model.head.linear.bias.abs().max() == 0
    assert 0.01 < model.head.linear.weight.std() < 0.03  # the family's own initialisation


def test_no_classifier(original: nn.Module, file: Path, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo"):
        model = zoo.create_model(M0, checkpoint=file, num_classes=0)
    assert not caplog.records
    with torch.inference_mode():
        pooled = original.forward_head(original.forward_features(images), pre_logits=True)
    assert torch.allclose(outputs(model, images), pooled, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_follow_timms_rule(channels: int, original: nn.Module, file: Path) -> None:
    model = zoo.create_model(M0, checkpoint=file, in_chans=channels)
    weight = original.patch_embed.conv1.conv.weight.detach()
    expected = timm.models.adapt_input_conv(channels, weight)
    assert torch.allclose(model.patch_embed.conv1.conv.weight, expected, atol=1e-7)
    mean = model.pretrained_cfg["mean"]
    assert len(mean) == model.pretrained_cfg["input_size"][0] == channels
    assert mean[0] == pytest.approx(sum(IMAGENET_MEAN) / 3)


@pytest.mark.parametrize("size", [64, (192, 256), 512])
def test_other_sizes(size: int | tuple[int, int], file: Path) -> None:
    model = zoo.create_model(M0, checkpoint=file, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert outputs(model, torch.randn(1, 3, height, width)).isfinite().all()
    assert model.pretrained_cfg["input_size"] == (3, height, width)


def test_half_precision_files_take_the_models_dtype(original: nn.Module, images: Tensor, tmp_path: Path) -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in original.state_dict().items()}
    save_safetensors(half, tmp_path / "half.safetensors")
    model = zoo.create_model(M0, checkpoint=tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.head.bn.num_batches_tracked.dtype == torch.int64
    assert torch.allclose(outputs(model, images), outputs(original, images), atol=0.05)


def test_dtype(file: Path, images: Tensor) -> None:
    model = zoo.create_model(M0, checkpoint=file, num_classes=4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.head.bn.running_var.dtype == torch.bfloat16
    assert outputs(model, images.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_float64")
def test_default_dtype(file: Path) -> None:
    assert {parameter.dtype for parameter in zoo.create_model(M0, checkpoint=file).parameters()} == {torch.float64}


def test_weights_need_a_real_device(file: Path) -> None:
    with pytest.raises(ConfigError, match="device is 'meta'"):
        zoo.create_model(M0, checkpoint=file, device="meta")
    with torch.device("meta"), pytest.raises(ConfigError, match="device is 'meta'"):
        zoo.create_model(M0, checkpoint=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "Device 'gpu' cannot be used here: PyTorch knows no such device; expected 'cpu'"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected a floating point torch.dtype"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_device_and_dtype_that_do_not_exist(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.create_model(M0, **options)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "'cpu'"), (1, "'cpu' or 'xpu:0'"), (8, "'cpu' or 'xpu:0' to 'xpu:7'")]
)
def test_devices_that_are_there_are_named(count: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.device("xpu") if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=re.escape(f"PyTorch knows no such device; expected {expected}.")):
        check_device("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_device(file: Path, original: nn.Module, images: Tensor) -> None:
    model = zoo.create_model(M0, checkpoint=file, device="cuda", num_classes=5)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert outputs(model, images.cuda()).shape == (2, 5)


# Features.


@pytest.mark.parametrize(
    "out_indices, levels", [(None, [0, 1, 2]), (2, [1, 2]), ((0, 2), [0, 2]), ([-1], [2]), ((-2, 0), [0, 1])]
)
def test_features_only(out_indices: Any, levels: list[int], file: Path, images: Tensor) -> None:
    model = zoo.create_model(M0, checkpoint=file).eval()
    with torch.inference_mode():
        expected = model.forward_intermediates(images, intermediates_only=True)
    net = zoo.create_model(M0, checkpoint=file, features_only=True, out_indices=out_indices)
    maps = outputs(net, images)
    assert len(maps) == len(levels)
    assert all(torch.equal(actual, expected[level]) for actual, level in zip(maps, levels, strict=True))
    assert net.feature_info.channels() == [found.shape[1] for found in maps]
    assert net.feature_info.reduction() == [(16, 32, 64)[level] for level in levels]
    assert "classifier" not in net.pretrained_cfg
    assert net.default_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    "out_indices, message",
    [
        ((0, 3), r"out_indices has 3; expected -3 to 2 \(3 feature levels\), nearest 2\.$"),
        ([-4], r"out_indices has -4; expected -3 to 2 .*, nearest -3\.$"),
        (4, r"out_indices=4 asks for the last 4 levels; expected 1 to 3, nearest 3\.$"),
        (0, r"expected 1 to 3, nearest 1\.$"),
        ((1, -2), r"out_indices is \(1, -2\), which names level 1 twice; expected each level once\.$"),
        *[
            (nothing, rf"out_indices is {re.escape(repr(nothing))}; expected .* a list of levels from -3 to 2\.$")
            for nothing in ((), "01", (0.5,), 1.0, True, (True,))
        ],
    ],
)
def test_feature_levels_are_checked_before_anything_is_built(
    out_indices: Any, message: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.factory.build", lambda *_, **__: pytest.fail("it was built"))
    for checkpoint in (None, file):
        with pytest.raises(ConfigError, match=message) as raised:
            zoo.create_model(M0, checkpoint=checkpoint, features_only=True, out_indices=out_indices)
        assert "\n" not in str(raised.value)


def test_feature_levels_follow_the_config() -> None:
    two_stages: dict[str, Any] = {"widths": (48, 96), "depths": (1, 1)}
    options: dict[str, Any] = two_stages | {"features_only": True}
    assert zoo.create_model("efficientvmamba_t", out_indices=[-1], **options).feature_info.channels() == [96]
    with pytest.raises(ConfigError, match="expected -2 to 1"):
        zoo.create_model("efficientvmamba_t", out_indices=[2], **options)


def test_features_only_has_no_classifier(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo"):
        net = zoo.create_model(M0, features_only=True, num_classes=10)
    assert "num_classes=10 has no effect" in caplog.text
    assert not any("head" in name for name, _ in net.named_parameters())


# What the model says of itself.


@pytest.mark.parametrize("name", [f"efficientvit_m{i}" for i in range(6)])
def test_pretrained_cfg_is_timms(name: str) -> None:
    ours = zoo.create_model(name).pretrained_cfg
    theirs = timm.create_model(name).pretrained_cfg
    assert PretrainedCfg(**ours).to_dict() == {**PretrainedCfg().to_dict(), **ours}
    for key in ("architecture", "tag", "input_size", "pool_size", "mean", "std", "interpolation", "crop_pct"):
        assert ours[key] == theirs[key], key
    for key in ("num_classes", "first_conv", "classifier", "license"):
        assert ours[key] == theirs[key], key
    assert not ours["fixed_input_size"]


def test_timm_resolves_preprocessing_from_the_model() -> None:
    model = zoo.create_model(M0, img_size=(96, 128))
    assert model.default_cfg is model.pretrained_cfg
    data = resolve_data_config(model=model)
    assert data["input_size"] == (3, 96, 128)
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")


@pytest.fixture
def three_classes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M0 with one packaged set of weights, for three classes at 64 px."""
    state = zoo.create_model(M0, checkpoint=file, num_classes=3, img_size=64).half().state_dict()
    save_safetensors(state, tmp_path / "m0.safetensors")
    (tmp_path / "efficientvit.toml").write_text(
        f"""
[{M0}.pets]
file = "m0.safetensors"
licence = "cc-by-4.0"
layout = "zoo"
config = {{ num_classes = 3, img_size = 64 }}
labels = ["cat", "dog", "frog"]
preprocessing = {{ img_size = 64, crop_pct = 1.0, mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] }}
"""
    )
    monkeypatch.setattr(manifest, "folder", lambda name: tmp_path)


@pytest.mark.usefixtures("three_classes")
def test_weights_bring_their_config() -> None:
    for name in (M0, f"{M0}.pets"):
        model = zoo.create_model(name, pretrained=True)
        assert (model.config.num_classes, model.config.img_size) == (3, 64)
        assert model.pretrained_cfg["label_names"] == ("cat", "dog", "frog")
        assert model.pretrained_cfg["input_size"] == (3, 64, 64)
        assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        assert model.pretrained_cfg["tag"] == "pets"
        assert outputs(model, torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    untrained = zoo.create_model(f"{M0}.pets")
    assert untrained.config.num_classes == 3
    plain = zoo.create_model(M0)
    assert plain.config == zoo.get_config(M0)
    assert plain.pretrained_cfg["input_size"] == (3, 224, 224)
    assert "label_names" not in plain.pretrained_cfg


@pytest.mark.usefixtures("three_classes")
def test_overrides_win_over_what_the_weights_bring() -> None:
    model = zoo.create_model(f"{M0}.pets", pretrained=True, num_classes=5, img_size=96)
    assert (model.config.num_classes, model.config.img_size) == (5, 96)
    assert model.pretrained_cfg["input_size"] == (3, 96, 96)
    assert model.pretrained_cfg["num_classes"] == 5
    assert "label_names" not in model.pretrained_cfg


# A family of another package.


@dataclass(frozen=True, kw_only=True)
class DotConfig(ImageConfig):
    widths: tuple[int, ...] = (8,)


class Dot(Backbone):
    def __init__(self, config: DotConfig) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(config.in_chans, config.widths[0], 4, 4))
        self.finish(config, widths=config.widths, reductions=(4,))

    def forward_stem(self, x: Tensor) -> Tensor:
        return x


def test_third_party_family_with_its_own_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    (tmp_path / "dot.toml").write_text(
        '[dot_s.test]\nfile = "dot.safetensors"\nlicence = "mit"\nlayout = "zoo"\nconfig = { num_classes = 2 }\n'
        'labels = ["no", "yes"]\n'
    )
    family = registry.Family(
        "dot",
        config=DotConfig,
        model=Dot,
        title="Dot",
        paper="",
        code="example.org/dot",
        licence="MIT",
        first_conv="stages.0",
        classifier="head",
        weights=tmp_path / "dot.toml",
    )

    @family.variant
    def dot_s() -> DotConfig:
        return DotConfig()

    zoo.register(family)
    trained = zoo.create_model("dot_s", num_classes=2)
    save_safetensors(trained.state_dict(), tmp_path / "dot.safetensors")
    assert zoo.list_models("dot*", pretrained=True) == ["dot_s.test"]
    model = zoo.create_model("dot_s", pretrained=True, in_chans=1)
    assert torch.equal(model.head.weight, trained.head.weight)
    assert model.pretrained_cfg["pool_size"] == (56, 56)
    assert outputs(model, torch.zeros(1, 1, 64, 64)).shape == (1, 2)
