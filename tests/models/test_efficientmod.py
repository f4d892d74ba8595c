"""EfficientMod against the authors' outputs, their figures, and what is special to the family."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from wrapper import Wrapper

import zoo
import zoo.layers
from zoo.analysis.counts import count
from zoo.families.efficientmod import EfficientModConfig
from zoo.models.efficientmod import AttentionBlock, ModulationBlock, ModulationMlp
from zoo.pretrained.convert import convert_state_dict

MODELS = zoo.list_models("efficientmod_*")

# Parameters of the authors' code, and billions of MACs in their README.
PUBLISHED = {
    "efficientmod_s": (12_897_184, 1.4),
    "efficientmod_s_conv": (12_872_336, 1.5),
    "efficientmod_xs": (6_627_544, 0.8),
    "efficientmod_xxs": (4_736_264, 0.6),
}
CASES = ["efficientmod_xs", "efficientmod_s"]


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0.0, atol=2e-5 * max(1.0, expected.std().item()))


def test_there_are_four() -> None:
    assert list(PUBLISHED) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    params, macs = PUBLISHED[name]
    counts = count(name)
    assert counts.params == params
    assert round(counts.macs / 1e9, 1) == macs


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_authors_weights_give_the_authors_outputs(name: str, golden: ModuleType, shared: Path) -> None:
    case = golden.load_case(shared / "golden" / f"{name}.json")
    expected = golden.load_outputs(shared / "golden" / f"{name}.json")
    model = zoo.create_model(name).eval()
    model.load_state_dict(convert_state_dict(golden.make_state(case["state"]), name))
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    assert count(name).macs == sum(case["macs_by_operator"][operator] for operator in ("conv", "linear", "matmul"))
    x = golden.make_input(case["input"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert_same(features, expected["features"])
        assert_same(model.forward_head(features, pre_logits=True), expected["pooled"])
        assert_same(model(x), expected["logits"])
        assert_same(model.fuse()(x), expected["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_the_papers_table(name: str) -> None:
    """Where attention is, and how wide: never less than 32 channels a head; ratios start again in every stage."""
    model = zoo.build(zoo.get_config(name), device="meta")
    attention = {"efficientmod_xxs": (1, 2), "efficientmod_xs": (3, 3), "efficientmod_s": (4, 4)}.get(name, (0, 0))
    for stage, depth in zip(model.stages, (0, 0, *attention), strict=True):
        blocks = list(stage.blocks)
        split = len(blocks) - depth
        assert all(isinstance(block, ModulationBlock) for block in blocks[:split])
        assert all(isinstance(block, AttentionBlock) for block in blocks[split:])
        wide = 4 if name == "efficientmod_xs" else 6
        assert [block.mlp.ratio for block in blocks[:split]] == [(1, wide)[i % 2] for i in range(split)]
        for block in blocks[split:]:
            assert block.attn.proj.in_features == max(256, block.attn.proj.out_features)


def test_modulation_is_the_papers(randomise: Callable) -> None:
    """Every group of values times the same context, written as the paper has it: the context repeated."""
    module = randomise(ModulationMlp(8, ratio=3, kernel_size=5))
    x = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = module.context(x).repeat(1, 1, 1, 3)
        expected = module.fc2(nn.functional.gelu(module.fc1(x)) * context)
        assert_close(module(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (320, 320), (384, 384), (512, 512), (160, 224), (97, 130)])
def test_any_size(size: tuple[int, int], randomise: Callable) -> None:
    """No weight depends on the size; maps round up at every stride."""
    model = randomise(zoo.create_model("efficientmod_xxs"))
    built = zoo.create_model("efficientmod_xxs", img_size=size).eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = model.forward_intermediates(images(*size), intermediates_only=True)
        assert [level.shape[2:] for level in maps] == [(-(-size[0] // r), -(-size[1] // r)) for r in (4, 8, 16, 32)]
        logits = model(images(*size))
        assert logits.std() > 0.1
        assert torch.equal(built(images(*size)), logits)


def test_fuse_folds_the_layer_scales(randomise: Callable) -> None:
    model = randomise(zoo.create_model("efficientmod_xxs"))
    fused = copy.deepcopy(model).fuse()
    assert not [key for key in fused.state_dict() if "gamma" in key]
    again = copy.deepcopy(fused).fuse()
    with torch.no_grad():
        expected = model(images(96))
        assert_same(fused(images(96)), expected)
        assert torch.equal(again(images(96)), fused(images(96)))


def test_fused_blocks_have_two_ways(randomise: Callable) -> None:
    """With gradients they take another way than without: both are the model."""
    model = randomise(zoo.create_model("efficientmod_xxs"))
    fused = copy.deepcopy(model).fuse()
    x = images(96, batch=2)
    expected = model(x)
    assert_same(fused(x), expected)
    with torch.no_grad():
        assert_same(fused(x), expected)
        fused.stages[1].blocks[1].fc1.weight.mul_(2)
        model.stages[1].blocks[1].mlp.fc1.weight.mul_(2)
        assert_same(fused(x), model(x))
        assert fused(x[:0]).shape == (0, 1000)
        for stage, plain in zip(fused.stages, model.stages, strict=True):
            maps = torch.randn(2, 6, 5, stage.blocks[-1].fc2.out_features)
            assert_same(stage.blocks[-1](maps), plain.blocks[-1](maps))  # a block by itself


def test_hooks_on_fused_models_are_called(randomise: Callable) -> None:
    fused = randomise(zoo.create_model("efficientmod_xxs")).fuse()
    names = {name for name, _ in fused.named_modules()} - {"stages.0.downsample"}
    called: list[str] = []
    with torch.no_grad():
        expected = fused(images(64))
        handles = [
            module.register_forward_hook(lambda *_, name=name: called.append(name))
            for name, module in fused.named_modules()
        ]
        assert_same(fused(images(64)), expected)
        assert names <= set(called)
        assert len(called) == len(set(called))
        for handle in handles:
            handle.remove()
        called.clear()
        everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
        assert_same(fused(images(64)), expected)
        everywhere.remove()
        assert called.count(zoo.layers.PackedLinear) > 40


@torch.no_grad()
@pytest.mark.parametrize("layer", ["blocks.0", "blocks.1.norm", "blocks.1.f", "blocks.1.conv", "blocks.0.fc2"])
def test_a_layer_in_the_place_of_another_runs(layer: str, randomise: Callable) -> None:
    model = randomise(zoo.create_model("efficientmod_xxs"))
    fused = copy.deepcopy(model).fuse()
    expected = fused(images(64))
    stage = fused.stages[0]
    parent, _, name = layer.rpartition(".")
    setattr(stage.get_submodule(parent), name, Wrapper(stage.get_submodule(layer)))
    seen: list[torch.Tensor] = []
    stage.get_submodule(layer).register_forward_hook(lambda _, args, output: seen.extend((output, output.clone())))
    assert_same(fused(images(64)), expected)
    assert len(seen) == 2
    assert torch.equal(*seen)


@torch.no_grad()
def test_what_hooks_on_fused_models_hold_is_not_written_over(randomise: Callable) -> None:
    fused = randomise(zoo.create_model("efficientmod_xxs")).fuse()
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def remember(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, *, name: str) -> None:
        seen.extend((name, x, x.clone()) for x in (*args, output))

    for name, module in fused.named_modules():
        handle = module.register_forward_hook(partial(remember, name=name))
        fused(images(64))  # by itself, so that what is around it goes the short way
        handle.remove()
    for name, module in fused.named_modules():
        module.register_forward_hook(partial(remember, name=name))
    fused(images(64))
    assert len(seen) > 400
    assert not [name for name, now, then in seen if not torch.equal(now, then)]


@torch.no_grad()
def test_the_first_call_of_a_fused_model_is_as_the_next_and_leaves_its_input(randomise: Callable) -> None:
    fused = randomise(zoo.create_model("efficientmod_xxs")).fuse()
    kept = images(64).to(memory_format=torch.channels_last)

    def check(part: nn.Module, x: torch.Tensor) -> None:
        before = x.clone()
        first = part(x)
        assert torch.equal(part(x), first)
        assert torch.equal(x, before)
        assert_same(part(x.contiguous()), first)

    maps = torch.randn(2, 32, 16, 16)
    channels_last = maps.to(memory_format=torch.channels_last)
    for x in (kept, kept.contiguous(), kept[..., ::2, 1:]):
        check(fused, x)
    for x in (channels_last, channels_last[:1], maps, maps[:1], maps[..., ::2, 1:]):
        check(fused.stages[0], x)
        check(fused.stages[0].blocks[0], x.permute(0, 2, 3, 1))


def test_stochastic_depth_rises_over_both_kinds_of_blocks() -> None:
    model = zoo.create_model("efficientmod_xxs", drop_path_rate=0.14)  # 15 blocks
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert isinstance(blocks[0].drop_path, nn.Identity)
    assert [block.drop_path.rate for block in blocks[1:]] == pytest.approx([0.01 * i for i in range(1, 15)])


def test_initialisation_after_to_empty(initialised_again: Callable) -> None:
    torch.manual_seed(0)
    expected = zoo.create_model("efficientmod_xxs")
    model = initialised_again(expected)
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if q.numel() >= 1000:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.2, abs=1e-8), key
        elif not q.std() > 0:  # constants: biases, norms and layer scales
            assert torch.equal(p, q), key
        assert p.isfinite().all(), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32, 64, 128)}, "widths has 3, depths has 4"),
        ({"mlp_ratios": (4.0,)}, "mlp_ratios has 1"),
        ({"depths": (2, 2, 0, 2)}, "positive"),
        ({"attention_depths": (0, 0, -1, 2)}, "attention_depths is"),
        ({"expand_ratios": ()}, "expand_ratios is empty"),
        ({"kernel_size": 6}, "kernel_size is 6; expected an odd one"),
        ({"img_size": 16}, "at least 32 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientModConfig(**changes)
