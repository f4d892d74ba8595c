"""What every image model must do. Parametrised over the registry: a new variant is tested by existing."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from timm.models import group_parameters
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.errors import ShapeError

MODELS = zoo.list_models(task="image-classification")
SIDE = 64  # of most inputs here; small, and most stages still have a map

pytestmark = pytest.mark.parametrize("name", MODELS)


def images(batch: int = 2, channels: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that make the logits; a model trained with distillation has two."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def test_logits_are_pooled_features_through_the_head(name: str) -> None:
    model = zoo.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        logits = model(images())
        features = model.forward_features(images())
        pooled = model.forward_head(features, pre_logits=True)
        assert logits.shape == (2, 7)
        assert features.shape[:2] == (2, model.num_features)
        assert pooled.shape == (2, model.head_hidden_size)
        assert_close(model.classify(pooled), logits)
        assert torch.equal(model.forward_head(features), logits)


def test_no_images_have_no_logits(name: str) -> None:
    model = zoo.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        assert model(images(0)).shape == (0, 7)
        maps = model.forward_intermediates(images(0), intermediates_only=True)
        assert [m.shape[:2] for m in maps] == [(0, info["num_chs"]) for info in model.feature_info]
        assert model.fuse()(images(0)).shape == (0, 7)


def test_backward_reaches_every_parameter(name: str, randomise: Callable) -> None:
    # With stochastic depth a block may be left out for all the pictures, by chance.
    model = randomise(zoo.create_model(name, num_classes=7, drop_path_rate=0.0)).train()
    model(images()).square().mean().backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    # Exact zeros everywhere would be a branch cut off. A bias before a batch norm has a gradient of rounding error.
    assert not [key for key, p in model.named_parameters() if not p.grad.any()]


def test_forward_intermediates(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name))
    levels = len(model.feature_info)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images())
        assert torch.equal(final, model.forward_features(images()))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        for m, info in zip(maps, model.feature_info, strict=True):
            assert m.shape[2:] == (-(-SIDE // info["reduction"]),) * 2
            assert model.get_submodule(info["module"])
        last = model.forward_intermediates(images(), indices=1, intermediates_only=True)
        assert len(last) == 1
        assert torch.equal(last[0], maps[-1])
        chosen = model.forward_intermediates(images(), indices=[0, -1], stop_early=True, intermediates_only=True)
        assert torch.equal(chosen[0], maps[0])
        assert torch.equal(chosen[1], maps[-1])
    with pytest.raises(zoo.ConfigError, match=f"{levels} feature levels"):
        model.forward_intermediates(images(), indices=[levels])
    with pytest.raises(zoo.ConfigError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_prune_intermediate_layers(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name))
    whole = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        maps = model.forward_intermediates(images(), intermediates_only=True)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([0]) == [0]
        assert torch.equal(pruned(images()), maps[0])
        assert sum(p.numel() for p in pruned.parameters()) < whole / 2
        assert pruned.num_classes == 0
        pruned.set_input_size(2 * SIDE)
        assert pruned(images(side=2 * SIDE)).shape[1] == maps[0].shape[1]
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(kept(images()), model(images()))


@pytest.mark.parametrize("out_indices", [None, 2, (0, -1)])
def test_features_only(name: str, out_indices: int | tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    net = zoo.create_model(name, features_only=True, out_indices=out_indices).eval()
    levels = zoo.create_model(name).feature_info
    chosen = {None: levels, 2: levels[-2:], (0, -1): [levels[0], levels[-1]]}[out_indices]
    with torch.no_grad():
        maps = net(images())
    assert net.feature_info.channels() == [level["num_chs"] for level in chosen] == [m.shape[1] for m in maps]
    assert net.feature_info.reduction() == [level["reduction"] for level in chosen]
    assert not hasattr(net, "num_classes")


def test_reset_classifier(name: str) -> None:
    model = zoo.create_model(name, num_classes=7).eval().to(torch.float64)
    x = images().double()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        heads = len(classifiers(model))
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert [head.out_features for head in classifiers(model)] == [3] * heads
        assert model.config.num_classes == model.num_classes == 3
        assert all(p.dtype == torch.float64 for p in model.parameters())
        assert not any(head.training for head in classifiers(model))
        model.reset_classifier(0, "")
        maps = model.forward_features(x)
        if model.head_hidden_size == model.num_features:
            assert torch.equal(model(x), maps)
        else:  # hidden layers of the head stay
            assert model(x).shape == (len(x), model.head_hidden_size, *maps.shape[2:])
        model.reset_classifier(3, "max")
        assert model(x).shape == (2, 3)
    with pytest.raises(zoo.ConfigError, match="pooled"):
        model.reset_classifier(3, "")
    assert model(x).shape == (2, 3)  # a refused change changes nothing


@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels(name: str, in_chans: int) -> None:
    model = zoo.create_model(name, in_chans=in_chans, num_classes=3).eval()
    assert model(images(channels=in_chans)).shape == (2, 3)
    assert model.pretrained_cfg["input_size"][0] == in_chans


def test_images_that_do_not_fit_are_refused(name: str) -> None:
    model = zoo.build(zoo.get_config(name).override(num_classes=3), device="meta").eval()
    side = model.min_input_side
    assert model(torch.empty(1, 3, side, side, device="meta")).shape == (1, 3)
    for shape in [(1, 3, side - 1, SIDE), (1, 3, SIDE, side - 1), (1, 1, SIDE, SIDE), (3, SIDE, SIDE)]:
        images = torch.empty(shape, device="meta")
        for run in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ShapeError, match=rf"Images are \[.*\]; .*at least {side} pixels"):
                run(images)


@pytest.mark.parametrize("option", [{"in_chans": 0}, {"num_classes": -1}, {"img_size": 15}, {"img_size": (224, 15)}])
def test_options_that_make_no_model_are_refused(name: str, option: dict) -> None:
    (field, value), *_ = option.items()
    with pytest.raises(zoo.ConfigError, match=rf"Config\.{field} is {re.escape(str(value))}; expected"):
        zoo.create_model(name, **option)


@pytest.mark.parametrize("field", ["depths", "widths"])
def test_lists_of_unequal_length_are_refused(name: str, field: str) -> None:
    entries = getattr(zoo.get_config(name), field)
    for other in (entries[:-1], (*entries, entries[-1]), ()):
        with pytest.raises(zoo.ConfigError, match=rf"{field} has {len(other)}\b.*expected one entry per stage in each"):
            zoo.create_model(name, **{field: other})


def test_no_classifier(name: str) -> None:
    model = zoo.create_model(name, num_classes=0).eval()
    assert model(images()).shape == (2, model.head_hidden_size)
    unpooled = zoo.create_model(name, num_classes=0, global_pool="").eval()
    assert unpooled(images()).ndim == 4


def test_meta_build_then_state_dict(name: str, randomise: Callable) -> None:
    real = randomise(zoo.create_model(name))
    meta = zoo.build(zoo.get_config(name), device="meta").eval()
    assert all(p.is_meta for p in meta.parameters())
    meta.load_state_dict(real.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(meta(images()), real(images()))


def test_state_dict_round_trip(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name))
    other = zoo.create_model(name).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


def test_config(name: str) -> None:
    config = zoo.get_config(name)
    again = zoo.config_from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again is not config
    assert config.override(num_classes=7) != config
    assert zoo.create_model(name).config == config


def test_no_weight_decay_names_exist(name: str) -> None:
    model = zoo.create_model(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_every_parameter(name: str, coarse: bool) -> None:
    model = zoo.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert [key for group in groups.values() for key in group] == [key for key, _ in model.named_parameters()]
    stem, head = groups[min(groups)], groups[max(groups)]
    assert all(not key.startswith(("stages", "head")) for key in stem)
    classifier = model.pretrained_cfg["classifier"]
    for prefix in (classifier,) if isinstance(classifier, str) else classifier:
        assert f"{prefix}.weight" in head
    assert len(groups) >= (3 if coarse else 2 + len(model.feature_info))


def test_gradient_checkpointing_changes_nothing(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name, num_classes=7, drop_path_rate=0.3)).train()
    checkpointing = copy.deepcopy(model)
    checkpointing.set_grad_checkpointing()
    momenta = [norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    for each in (model, checkpointing):
        torch.manual_seed(0)
        each(images()).square().mean().backward()
    for plain, recomputed in zip(model.parameters(), checkpointing.parameters(), strict=True):
        assert_close(recomputed.grad, plain.grad)
    for plain, recomputed in zip(model.buffers(), checkpointing.buffers(), strict=True):
        assert torch.equal(recomputed, plain)  # a batch norm that sees a batch again counts it once
    assert [norm.momentum for norm in checkpointing.modules() if isinstance(norm, nn.BatchNorm2d)] == momenta


def test_fuse(name: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name)).double()
    fused = copy.deepcopy(model).train().fuse()
    assert not fused.training
    assert not [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    x = images().double()
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() < 1e-12 * expected.std()
        scale = max(1.0, expected.std().item())
        assert (fused.float()(x.float()) - expected).abs().max() < 2e-5 * scale
        single = copy.deepcopy(model).float().fuse()
        assert (single(x.float()) - expected).abs().max() < 2e-5 * scale


def test_fused_model_is_a_model(name: str, randomise: Callable) -> None:
    fused = randomise(zoo.create_model(name)).fuse()
    other = zoo.create_model(name).fuse()
    other.load_state_dict(fused.state_dict())
    with torch.no_grad():
        expected = fused(images())
        assert torch.equal(copy.deepcopy(fused)(images()), expected)
        assert torch.equal(other(images()), expected)
        assert torch.equal(copy.deepcopy(fused).double().float()(images()), expected)
        assert fused.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16
