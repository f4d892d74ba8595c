"""EfficientNet against timm's, the paper's figures, and what is special to the family."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.families.efficientnet import EfficientNetConfig, compound
from zoo.models.efficientnet import DepthwiseSeparable, InvertedResidual

MODELS = zoo.list_models("efficientnet_b*")

# Millions of parameters and of multiply-accumulates: Table 2 of the paper, which rounds, and the same networks counted
# by the complexity code of facebookresearch/pycls. The two disagree on B1, B4 and B5 by 2 to 5 %: there the paper's
# figures are not those of the networks that its own coefficients give.
PAPER = {
    "efficientnet_b0": (5.3, 390),
    "efficientnet_b1": (7.8, 700),
    "efficientnet_b2": (9.2, 1000),
    "efficientnet_b3": (12, 1800),
    "efficientnet_b4": (19, 4200),
    "efficientnet_b5": (30, 9900),
    "efficientnet_b6": (43, 19000),
    "efficientnet_b7": (66, 37000),
}
PYCLS = {  # parameters, MACs and activations in millions
    "efficientnet_b0": (5.289, 386, 6.748),
    "efficientnet_b1": (7.794, 687, 10.884),
    "efficientnet_b2": (9.110, 994, 13.833),
    "efficientnet_b3": (12.233, 1827, 23.831),
    "efficientnet_b4": (19.342, 4394, 49.489),
    "efficientnet_b5": (30.390, 10266, 98.857),
}


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0.0, atol=2e-5 * max(1.0, expected.std().item()))


def test_there_are_eight() -> None:
    assert list(PAPER) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    from zoo.analysis.counts import count

    counts = count(name)
    params, macs = PAPER[name]
    assert counts.params / 1e6 == pytest.approx(params, rel=0.02)
    assert counts.macs / 1e6 == pytest.approx(macs, rel=0.05)
    if name in PYCLS:
        params, macs, activations = PYCLS[name]
        assert counts.params / 1e6 == pytest.approx(params, abs=6e-4)
        assert round(counts.macs / 1e6) == macs
        assert counts.activations / 1e6 == pytest.approx(activations, abs=6e-4)


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_features_as_timm(name: str) -> None:
    ours = zoo.build(zoo.get_config(name), device="meta")
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert [(key, tensor.shape) for key, tensor in ours.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in theirs.state_dict().items()
    ]
    for level, expected in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert level == {key: expected[key] for key in level}


@pytest.mark.parametrize("name", [*timm.list_pretrained("efficientnet_b[0-7].*"), *timm.list_pretrained("tinynet_*")])
def test_every_tag_of_timms(name: str) -> None:
    ours = zoo.create_model(name, device="meta").pretrained_cfg
    theirs = timm.get_pretrained_cfg(name).to_dict()
    for key in ("tag", "input_size", "pool_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert ours[key] == theirs[key], key
    for key in ("num_classes", "first_conv", "classifier", "license"):
        assert ours[key] == theirs[key], key
    assert ours["hf_hub_id"] == f"{theirs['hf_hub_id']}@main"
    variant, _ = name.split(".")
    assert zoo.get_weights(variant).tag == timm.get_pretrained_cfg(variant).tag


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_as_timm(name: str, randomise: Callable) -> None:
    ours = randomise(zoo.create_model(name))
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    sizes = [(106, 106), (96, 160)] if name > "efficientnet_b3" else [(224, 224), (188, 188), (106, 320), (64, 96)]
    with torch.no_grad():
        for size in sizes:
            x = images(*size)
            expected, maps = theirs.forward_intermediates(x)
            assert expected.std() > 0.05  # weights reach it, and the input:
            assert (theirs.forward_features(images(*size, batch=2)[1:]) - expected).std() > 0.3 * expected.std()
            final, own_maps = ours.forward_intermediates(x)
            for actual, level in zip([*own_maps, final], [*maps, expected], strict=True):
                assert_same(actual, level)
            assert_same(ours.forward_head(final), theirs.forward_head(expected))


def test_loads_in_both_directions(randomise: Callable) -> None:
    theirs = timm.create_model("efficientnet_b0").eval()
    theirs.load_state_dict(randomise(zoo.create_model("efficientnet_b0")).state_dict())
    ours = zoo.create_model("efficientnet_b0").eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_same(ours(images(224)), theirs(images(224)))


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b1"])
def test_fuse(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name)).double()
    fused = copy.deepcopy(model).fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    x = images(96).double()
    with torch.no_grad():
        expected = model(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_close(fused(x.to(memory_format=layout)), expected, rtol=0.0, atol=1e-11 * expected.std().item())
        assert fused.forward_features(x).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(copy.deepcopy(fused).fuse()(x), fused(x))  # there is nothing left to fold


def test_a_pruned_model_fuses(randomise: Callable) -> None:
    net = randomise(zoo.create_model("efficientnet_b0"))
    maps = net.forward_intermediates(images(96), intermediates_only=True)
    net.prune_intermediate_layers([3], prune_norm=True)
    assert net.num_features == net.head_hidden_size == maps[3].shape[1] == 112
    net.fuse()
    with torch.no_grad():
        assert_same(net(images(96)), maps[3])


def test_last_convolution_is_no_part_of_a_level(randomise: Callable) -> None:
    """timm's levels end with the stages: 320 channels where the features have 1280, pruned or not, normed or not."""
    model = randomise(zoo.create_model("efficientnet_b0"))
    with torch.no_grad():
        final, maps = model.forward_intermediates(images(96), norm=True)
        assert (final.shape[1], maps[-1].shape[1]) == (model.num_features, 320) == (1280, 320)
        early, _ = model.forward_intermediates(images(96), indices=[2], stop_early=True)
        assert torch.equal(early, maps[2])
        model.prune_intermediate_layers(5, prune_norm=True)
        assert model.num_features == 320
        assert torch.equal(model(images(96)), maps[-1])


def test_stochastic_depth_rises_over_the_blocks() -> None:
    model = zoo.create_model("efficientnet_b0", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "rate", 0.0) for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.02 * i for i in range(16)])


def test_dropout_acts_in_training_only(randomise: Callable) -> None:
    model = randomise(zoo.create_model("efficientnet_b0", drop_rate=0.5))
    features = model.forward_features(images(64))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_initialisation_is_the_original_codes(initialised_again: Callable) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("efficientnet_b0")
    again = initialised_again(model)
    for network in (model, again):
        block = network.blocks[5][1]
        for conv, fan_out in ((block.conv_pw, 1152), (block.conv_dw, 25), (block.conv_pwl, 192)):
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not block.se.conv_expand.bias.any()
        assert network.eval()(images(64)).isfinite().all()


def test_blocks_follow_the_expansion() -> None:
    config = EfficientNetConfig(expand_ratios=(1, 6, 6, 1, 4.5, 6, 6))
    with torch.device("meta"):
        model = zoo.build(config)
    kinds = [type(stage[0]) for stage in model.blocks]
    assert [kind is DepthwiseSeparable for kind in kinds] == [True, False, False, True, False, False, False]
    assert [kind is InvertedResidual for kind in kinds] == [False, True, True, False, True, True, True]
    assert model.blocks[4][0].conv_pw.out_channels == 360


def test_levels_follow_the_strides() -> None:
    config = EfficientNetConfig(strides=(2, 1, 2, 1, 1, 1, 1))
    model = zoo.build(config)
    assert [level["reduction"] for level in model.feature_info] == [4, 8]
    assert [level["module"] for level in model.feature_info] == ["blocks.1", "blocks.6"]
    maps = model.forward_intermediates(images(64), intermediates_only=True)
    assert [level.shape[2] for level in maps] == [16, 8]


def test_scaling_by_nothing_changes_nothing() -> None:
    assert compound(width=1.0, depth=1.0, img_size=224) == EfficientNetConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2, 2)}, "depths has 3"),
        ({"widths": (16, 24, 40, 80, 112, 192, 0)}, "positive"),
        ({"strides": (1, 2, 3, 2, 1, 2, 1)}, "expected 1 or 2"),
        ({"kernel_sizes": (3, 3, 5, 4, 5, 5, 3)}, "odd sizes"),
        ({"expand_ratios": (1, 6, 6, 6, 0.5, 6, 6)}, "1 .no expansion. or more"),
        ({"img_size": 31}, "at least 32 pixels"),
        ({"img_size": (64, 16)}, "at least 32 pixels"),
        ({"strides": (2,) * 7, "img_size": 224}, "at least 256 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientNetConfig(**changes)
