"""EfficientFormerV2 against the authors' outputs, timm's port, the published figures, and what is special to it."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_levit
from torch.testing import assert_close

import zoo
from zoo.families.efficientformer_v2 import EfficientFormerV2Config
from zoo.models.efficientformer_v2 import Attention2d
from zoo.pretrained.convert import convert_state_dict

MODELS = ["efficientformerv2_s0", "efficientformerv2_s1", "efficientformerv2_s2", "efficientformerv2_l"]

# Parameters of the released code, both heads included; GMACs of the authors' README.
PUBLISHED = {
    "efficientformerv2_s0": (3_600_256, 0.40),
    "efficientformerv2_s1": (6_185_560, 0.65),
    "efficientformerv2_s2": (12_710_112, 1.25),
    "efficientformerv2_l": (26_322_288, 2.56),
}
CASE = "efficientformerv2_s0"


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0.0, atol=2e-5 * max(1.0, expected.std().item()))


def test_there_are_four() -> None:
    assert sorted(MODELS) == sorted(zoo.list_models("efficientformerv2_*"))


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    from zoo.analysis.counts import count

    params, gmacs = PUBLISHED[name]
    counts = count(name)
    assert counts.params == params
    assert round(counts.macs / 1e9, 2) == pytest.approx(gmacs, rel=0.01)


@pytest.mark.shared
def test_authors_weights_give_the_authors_outputs(golden: ModuleType, shared: Path) -> None:
    case = golden.load_case(shared / "golden" / f"{CASE}.json")
    expected = golden.load_outputs(shared / "golden" / f"{CASE}.json")
    assert [list(ratios) for ratios in zoo.get_config(CASE).mlp_ratios] == list(case["config"]["e_ratios"].values())
    model = zoo.create_model(CASE).eval()
    model.load_state_dict(convert_state_dict(golden.make_state(case["state"]), CASE), strict=True)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    x = golden.make_input(case["input"])
    with torch.no_grad():
        for _ in range(2):
            features = model.forward_features(x)
            assert_same(features, expected["features"])
            assert_same(model.forward_head(features, pre_logits=True), expected["pooled"])
            assert_same(model.forward_head(features), expected["logits"])
            model.fuse()  # and once more


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_outputs_as_timm(name: str, randomise: Callable) -> None:
    weights = randomise(zoo.create_model(name)).state_dict()
    with torch.no_grad():
        for size in [(224, 224), (96, 160)]:
            ours, theirs = (create(name, img_size=size).eval() for create in (zoo.create_model, timm.create_model))
            ours.load_state_dict(weights)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            expected = theirs(images(*size))
            assert expected.std() > 0.1  # an output that weights and input matter to
            assert_same(ours(images(*size)), expected)
            assert_same(ours.fuse()(images(*size)), expected)


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (320, 320), (384, 384), (512, 512), (224, 320)])
def test_weights_for_224_at_another_size(size: tuple[int, int], randomise: Callable) -> None:
    """In a model built for it, in one built for 224, in that one once it is told, and fused: all the same."""
    model = randomise(zoo.create_model(CASE))
    built = zoo.create_model(CASE, img_size=size).eval()
    built.load_state_dict(model.state_dict())
    if size[0] == size[1]:
        for key, reduction in [("stages.2.blocks.4.token_mixer", 32), ("stages.3.downsample.attn", 16)]:
            table = model.get_parameter(f"{key}.attention_biases")
            resized = resize_rel_pos_bias_table_levit(table.T, ((size[0] // reduction) ** 2, 8)).T
            assert_close(built.get_parameter(f"{key}.attention_biases"), resized)
    theirs = timm.create_model(CASE, img_size=size).eval()
    theirs.load_state_dict(built.state_dict())
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        expected = theirs(images(*size))
        assert_same(built(images(*size)), expected)
        assert_same(model(images(*size)), expected)
        assert_same(fused(images(*size)), expected)
        for changed in (model, fused):
            changed.set_input_size(size)
            assert_same(changed(images(*size)), expected)
    assert model.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(tensor, built.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [(240, 240), (200, 120), (33, 47)])
def test_sizes_that_the_strides_do_not_divide(size: tuple[int, int], randomise: Callable) -> None:
    model = randomise(zoo.create_model(CASE, img_size=size))
    with torch.no_grad():
        maps = model.forward_intermediates(images(*size), intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [model.config.map_hw(4 * 2**i) for i in range(4)]
        expected = model(images(*size))
        assert expected.isfinite().all()
        assert_same(model.fuse()(images(*size)), expected)


def test_upsampling_after_stride_attention_keeps_places() -> None:
    """The columns of an odd map are the first ones of the even map: nothing is stretched."""
    attention = Attention2d(8, num_heads=2, key_dim=4, value_dim=8, stride=2, map_hw=(4, 4), reduction=32).eval()
    even, odd = torch.randn(1, 8, 8, 8), torch.zeros(1, 8, 8, 8)
    odd[..., :7] = even[..., :7]
    with torch.no_grad():
        assert_close(attention(odd[..., :7]), attention(odd)[..., :7])


def test_attention_is_in_the_last_blocks() -> None:
    model = zoo.create_model("efficientformerv2_s2", device="meta")
    attention = [[block.token_mixer is not None for block in stage.blocks] for stage in model.stages]
    assert attention == [[False] * 4, [False] * 4, [False] * 8 + [True] * 4, [False] * 4 + [True] * 4]
    assert [block.mlp.mid.conv.groups for block in model.stages[3].blocks] == [
        288 * r for r in (4, 4, 3, 3, 3, 3, 4, 4)
    ]


def test_stochastic_depth() -> None:
    rates = [zoo.get_config(name).drop_path_rate for name in MODELS]
    assert rates == [0.0, 0.0, 0.02, 0.1]
    model = zoo.create_model("efficientformerv2_l", device="meta")
    assert model.stages[3].blocks[-1].drop_path1.rate == model.stages[3].blocks[-1].drop_path2.rate == 0.1


def test_fused_model(randomise: Callable) -> None:
    fused = randomise(zoo.create_model(CASE)).fuse()
    with torch.no_grad():
        maps = fused.forward_intermediates(images(64), intermediates_only=True)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
        expected = fused(images(64))
        assert torch.equal(fused.fuse()(images(64)), expected)  # nothing is folded twice
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(fused(images(64)).float(), expected, rtol=0.0, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32, 48, 96)}, "widths has 3, depths has 4"),
        ({"widths": (31, 48, 96, 176)}, "even number"),
        ({"mlp_ratios": ((4, 4), (4, 4), (4,) * 5, (4,) * 4)}, r"mlp_ratios\[2\] .* expected 6 positive numbers"),
        ({"mlp_ratios": ((4, 4), (4, 4), (4,) * 5 + (0,), (4,) * 4)}, r"mlp_ratios\[2\] .* expected 6 positive"),
        ({"attention_depths": (0, 0, 7, 2)}, r"attention_depths\[2\] is 7; expected 0 to 6"),
        ({"attention_strides": (1, 1, 0, 1)}, "positive"),
        ({"attention_downsample": (True, False, False, True)}, "first stage"),
        ({"img_size": (224, 16)}, "at least 32 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientFormerV2Config(**changes)
