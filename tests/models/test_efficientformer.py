"""EfficientFormer against the authors' outputs, timm's port of it, the published figures, and what is special to it."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resize_rel_pos_bias_table_levit
from timm.models.efficientformer import Attention as TimmAttention
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.families.efficientformer import EfficientFormerConfig
from zoo.models.efficientformer import Block3d, ToTokens
from zoo.pretrained.convert import convert_state_dict

MODELS = zoo.list_models("efficientformer_*")

# Parameters of the released code, both heads included; GMACs of the paper's Table 1.
PUBLISHED = {
    "efficientformer_l1": (12_289_928, 1.3),
    "efficientformer_l3": (31_406_000, 3.9),
    "efficientformer_l7": (82_229_328, 10.2),
}
CASE = "efficientformer_l1"
TABLE = "stages.3.blocks.4.token_mixer.attention_biases"  # of L1


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0.0, atol=2e-5 * max(1.0, expected.std().item()))


def timms(ours: nn.Module, name: str) -> nn.Module:
    """timm's model with our weights, its attention rebuilt for the size of our model: as it comes it takes 224 only."""
    theirs = timm.create_model(name)
    for block in theirs.stages[-1].blocks:
        if isinstance(getattr(block, "token_mixer", None), TimmAttention):
            block.token_mixer = TimmAttention(ours.num_features, resolution=ours.config.map_hw(32))
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("attention_bias_idxs") for key in result.missing_keys)
    return theirs.eval()


def test_there_are_three() -> None:
    assert list(PUBLISHED) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    from zoo.analysis.counts import count

    params, gmacs = PUBLISHED[name]
    counts = count(name)
    assert counts.params == params
    assert counts.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.shared
def test_authors_weights_give_the_authors_outputs(golden: ModuleType, shared: Path) -> None:
    case = golden.load_case(shared / "golden" / f"{CASE}.json")
    expected = golden.load_outputs(shared / "golden" / f"{CASE}.json")
    model = zoo.create_model(CASE).eval()
    model.load_state_dict(convert_state_dict(golden.make_state(case["state"]), CASE), strict=True)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    x = golden.make_input(case["input"])
    with torch.no_grad():
        for _ in range(2):
            features = model.forward_features(x)
            assert_same(features.flatten(2).transpose(1, 2), expected["features"])  # theirs are tokens
            assert_same(model.forward_head(features, pre_logits=True), expected["pooled"])
            assert_same(model.forward_head(features), expected["logits"])
            model.fuse()  # and once more


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_as_timm(name: str, randomise: Callable) -> None:
    weights = randomise(zoo.create_model(name)).state_dict()
    with torch.no_grad():
        for size in [(224, 224), (96, 160)]:
            ours = zoo.create_model(name, img_size=size).eval()
            ours.load_state_dict(weights)
            expected = timms(ours, name)(images(*size))
            assert expected.std() > 0.1  # an output that weights and input matter to
            assert_same(ours(images(*size)), expected)
            assert_same(ours.fuse()(images(*size)), expected)


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (320, 320), (384, 384), (512, 512), (224, 320), (200, 120)])
def test_weights_for_224_at_another_size(size: tuple[int, int], randomise: Callable) -> None:
    """In a model built for it, in one built for 224, in that one once it is told, and fused: all the same."""
    model = randomise(zoo.create_model(CASE))
    built = zoo.create_model(CASE, img_size=size).eval()
    built.load_state_dict(model.state_dict())
    if size[0] == size[1]:
        side = size[0] // 32
        table = resize_rel_pos_bias_table_levit(model.get_parameter(TABLE).T, (side**2, 8)).T
        assert_close(built.get_parameter(TABLE), table)
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        expected = timms(built, CASE)(images(*size))
        assert_same(built(images(*size)), expected)
        assert_same(model(images(*size)), expected)
        assert_same(fused(images(*size)), expected)
        for resized in (model, fused):
            resized.set_input_size(size)
            assert_same(resized(images(*size)), expected)
    assert model.config.input_hw == size
    assert torch.equal(model.get_parameter(TABLE), built.get_parameter(TABLE))


def test_bias_tables_are_resampled_by_load_state_dict(randomise: Callable, caplog: pytest.LogCaptureFixture) -> None:
    weights = randomise(zoo.create_model(CASE)).state_dict()
    with caplog.at_level(logging.INFO, logger="zoo"):
        zoo.create_model(CASE, img_size=(256, 160)).load_state_dict(weights, strict=True)
    assert f"{TABLE} resampled from 49 to 40 entries" in caplog.messages
    with pytest.raises(RuntimeError, match="size mismatch"):  # other heads are another model, not another size
        zoo.create_model(CASE).load_state_dict({**weights, TABLE: torch.zeros(4, 64)})


def test_timms_own_file_loads(tmp_path: Path, randomise: Callable) -> None:
    """It holds the index of the bias table, which is computed here."""
    theirs = randomise(timm.create_model(CASE))
    state = theirs.state_dict()
    assert TABLE.replace("biases", "bias_idxs") in state
    save_file(state, tmp_path / "timm.safetensors")
    ours = zoo.create_model(CASE, checkpoint=tmp_path / "timm.safetensors").eval()
    assert convert_state_dict(state, CASE).keys() == ours.state_dict().keys()
    with torch.no_grad():
        assert_same(ours(images(224)), theirs(images(224)))
    few = zoo.create_model(CASE, checkpoint=tmp_path / "timm.safetensors", num_classes=3, img_size=64).eval()
    assert few(images(64)).shape == (1, 3)


def test_blocks_on_tokens_come_last() -> None:
    model = zoo.create_model("efficientformer_l3")
    assert [type(block).__name__ for block in model.stages[3].blocks] == ["Block4d"] * 2 + ["ToTokens"] + [
        "Block3d"
    ] * 4
    assert not any(isinstance(module, Block3d | ToTokens) for module in model.stages[:3].modules())
    early = zoo.create_model(CASE, attention_depths=(0, 0, 6, 2)).eval()  # a split that the paper does not have
    assert early(images(96)).shape == (1, 1000)


def test_distillation(randomise: Callable) -> None:
    """Two classifiers: their mean is the output, and the pair when it is asked for in training."""
    model = randomise(zoo.create_model(CASE, num_classes=7))
    assert model.get_classifier() == (model.head, model.head_dist)
    x = images(64, batch=2)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        mean = (model.head(pooled) + model.head_dist(pooled)) / 2
        assert_close(model(x), mean)
        model.set_distilled_training()
        assert_close(model(x), mean)  # in eval mode nothing changes
        model.train()
        logits, logits_dist = model(x)
        assert logits.shape == logits_dist.shape == (2, 7)
        assert not torch.equal(logits, logits_dist)
        model.set_distilled_training(False)
        assert model(x).shape == (2, 7)
        mean = model.eval()(x)  # not the one above: training changed the statistics of the norms
        model.fuse()
        assert isinstance(model.get_classifier(), nn.Linear)
        assert_close(model(x), mean, rtol=0.0, atol=1e-5)
        model.reset_classifier(5)
        assert [head.out_features for head in model.get_classifier()] == [5, 5]
        assert model(x).shape == (2, 5)


def test_dropout_before_the_classifiers(randomise: Callable) -> None:
    model = randomise(zoo.create_model(CASE, drop_rate=0.5))
    assert torch.equal(model(images(64)), model(images(64)))
    model.head_drop.train()
    assert not torch.equal(model(images(64)), model(images(64)))


def test_fused_model_is_channels_last(randomise: Callable) -> None:
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
        ({"widths": (48, 96, 224)}, "widths has 3, depths has 4"),
        ({"widths": (47, 96, 224, 448)}, "even number"),
        ({"attention_depths": (0, 0, 1)}, "attention_depths has 3"),
        ({"attention_depths": (0, 0, 0, 5)}, r"attention_depths\[3\] is 5; the stage has 4 blocks"),
        ({"pool_size": 2}, "odd number"),
        ({"depths": (3, 2, 0, 4)}, "positive"),
        ({"img_size": 31}, "at least 32 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientFormerConfig(**changes)
