"""TinyNet against the authors' outputs, timm's, the paper's figures, and EfficientNet-B0, of which it is made."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.errors import WeightsError
from zoo.families.tinynet import twisted
from zoo.models.efficientnet import EfficientNet
from zoo.pretrained.convert import convert_state_dict, to_authors

MODELS = zoo.list_models("tinynet_*")

# The authors' README (MACs in millions), and per variant: parameters of the released code, input, depths and widths.
PUBLISHED = {
    "tinynet_a": (339, 6_187_972, 192, (1, 2, 2, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "tinynet_b": (202, 3_730_562, 188, (1, 2, 2, 3, 3, 4, 1), (16, 24, 32, 64, 88, 144, 240)),
    "tinynet_c": (100, 2_457_234, 184, (1, 2, 2, 3, 3, 3, 1), (8, 16, 24, 40, 64, 104, 176)),
    "tinynet_d": (52, 2_338_446, 152, (1, 1, 1, 2, 2, 3, 1), (8, 16, 24, 40, 64, 104, 176)),
    "tinynet_e": (24, 2_042_972, 106, (1, 1, 1, 2, 2, 2, 1), (8, 16, 24, 40, 56, 96, 160)),
}
CASES = ["tinynet_a", "tinynet_e"]


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0.0, atol=2e-5 * max(1.0, expected.std().item()))


def golden_model(golden: ModuleType, shared: Path, name: str) -> nn.Module:
    case = golden.load_case(shared / "golden" / f"{name}.json")
    model = zoo.create_model(name).eval()
    model.load_state_dict(convert_state_dict(golden.make_state(case["state"]), name), strict=True)
    return model


def test_there_are_five() -> None:
    assert list(PUBLISHED) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    from zoo.analysis.counts import count

    macs, params, img_size, depths, widths = PUBLISHED[name]
    config = zoo.get_config(name)
    assert (config.img_size, config.depths, config.widths) == (img_size, depths, widths)
    assert (config.stem_width, config.head_width) == (32, 1280)
    counts = count(name)
    assert counts.params == params
    assert counts.macs / 1e6 == pytest.approx(macs, rel=0.01) or round(counts.macs / 1e6) == macs  # 24.4 of E is "24M"


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_authors_weights_give_the_authors_outputs(name: str, golden: ModuleType, shared: Path) -> None:
    case = golden.load_case(shared / "golden" / f"{name}.json")
    expected = golden.load_outputs(shared / "golden" / f"{name}.json")
    model = golden_model(golden, shared, name)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    assert zoo.get_config(name).img_size == case["config"]["resolution"]
    x = golden.make_input(case["input"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert_same(features, expected["features"])
        assert_same(model.forward_head(features, pre_logits=True), expected["pooled"])
        assert_same(model(x), expected["logits"])
        assert_same(model.fuse()(x), expected["logits"])


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_authors_names_are_ours(name: str, golden: ModuleType, shared: Path) -> None:
    state = golden.make_state(golden.load_case(shared / "golden" / f"{name}.json")["state"])
    assert list(state) == list(zoo.create_model(name).state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in convert_state_dict(state, name).items())
    with pytest.raises(WeightsError, match="no other layout"):
        to_authors(state, name)


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_as_timm(name: str) -> None:
    ours = zoo.build(zoo.get_config(name), device="meta")
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert [(key, tensor.shape) for key, tensor in ours.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in theirs.state_dict().items()
    ]
    for level, expected in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert level == {key: expected[key] for key in level}


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_as_timm(name: str, randomise: Callable) -> None:
    ours = randomise(zoo.create_model(name))
    for norm in ours.modules():  # the statistics that go with the weights, or the signal dies away
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        ours.train()(images(96, batch=4))
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(ours.eval().state_dict())
    own = ours.config.img_size
    with torch.no_grad():
        for size in [(own, own), (224, 224), (96, 96), (106, 188), (320, 152)]:
            expected = theirs(images(*size))
            assert expected.std() > 0.1
            assert_same(ours(images(*size)), expected)


def test_sizes_round_up_at_every_stride() -> None:
    """106 px, which no stride divides for long: 53, 27, 14, 7, 4."""
    model = zoo.create_model("tinynet_e").eval()
    with torch.no_grad():
        maps = model.forward_intermediates(images(106), intermediates_only=True)
    assert [level.shape[2] for level in maps] == [53, 27, 14, 7, 4]
    assert model.pretrained_cfg["pool_size"] == (4, 4)


def test_the_cube_untwisted_is_b0() -> None:
    config = twisted(r=1, d=1, w=1)
    assert config.to_dict() == zoo.get_config("efficientnet_b0").to_dict()
    assert type(zoo.build(config)) is EfficientNet
    assert zoo.config_from_json(config.to_json()) == config


def test_last_convolution_grows_but_never_shrinks() -> None:
    assert twisted(r=1, d=1, w=0.1).head_width == 1280
    assert twisted(r=1, d=1, w=1.5).head_width == 1920
    assert twisted(r=1, d=0.1, w=1).depths == (1,) * 7
