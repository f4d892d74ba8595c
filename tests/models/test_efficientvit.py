"""EfficientViT (MSRA) against timm's port of it, the papers' figures, and what is special to the family."""

import copy
import logging
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_levit
from timm.models.efficientvit_msra import checkpoint_filter_fn
from torch.testing import assert_close

import zoo
from zoo.families.efficientvit import EfficientViTConfig
from zoo.models.efficientvit import LocalWindowAttention

MODELS = zoo.list_models("efficientvit_m*")

# Table 2 of the paper and the authors' README: millions of parameters and of multiply-accumulates at 224 px.
PUBLISHED = {
    "efficientvit_m0": (2.3, 79),
    "efficientvit_m1": (3.0, 167),
    "efficientvit_m2": (4.2, 201),
    "efficientvit_m3": (6.9, 263),
    "efficientvit_m4": (8.8, 299),
    "efficientvit_m5": (12.4, 522),
}


def images(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 * max(1.0, expected.std().item())
    assert_close(actual, expected, rtol=0.0, atol=tolerance)


def windows(model: torch.nn.Module) -> list[int]:
    """Side of the attention windows in each stage."""
    return [next(m.window for m in stage.modules() if isinstance(m, LocalWindowAttention)) for stage in model.stages]


def test_there_are_six() -> None:
    assert list(PUBLISHED) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    from zoo.analysis.counts import count

    params, macs = PUBLISHED[name]
    counts = count(name)
    assert counts.params / 1e6 == pytest.approx(params, abs=0.08)  # the authors cut M5's 12.47 down
    assert round(counts.macs / 1e6) == macs


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_outputs_as_timm(name: str, randomise: Callable) -> None:
    ours = randomise(zoo.create_model(name))
    theirs = timm.create_model(name).eval()
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for size in [(224, 224), (96, 96), (128, 128), (320, 320), (384, 384), (224, 320), (160, 96)]:
            expected = theirs(images(*size))
            assert expected.std() > 0.1  # an output that weights and input matter to
            assert_same_logits(ours(images(*size)), expected)


@pytest.mark.parametrize("size", [96, 128, 320, 384, 512])
@pytest.mark.parametrize("name", MODELS)
def test_weights_for_224_in_a_model_for_another_size(name: str, size: int, randomise: Callable) -> None:
    weights = randomise(zoo.create_model(name)).state_dict()
    ours = zoo.create_model(name, img_size=size).eval()
    ours.load_state_dict(weights)
    theirs = timm.create_model(name, img_size=size).eval()
    theirs.load_state_dict(checkpoint_filter_fn(weights, theirs))
    with torch.no_grad():
        assert_same_logits(ours(images(size)), theirs(images(size)))


def test_weights_are_unchanged_by_loading_them_elsewhere(randomise: Callable) -> None:
    weights = randomise(zoo.create_model("efficientvit_m0")).state_dict()
    before = {key: tensor.clone() for key, tensor in weights.items()}
    zoo.create_model("efficientvit_m0", img_size=512).load_state_dict(weights)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("img_size", "expected"),
    [
        (224, [7, 7, 4]),
        (512, [7, 7, 7]),
        (96, [6, 3, 2]),
        (64, [4, 2, 1]),
        ((224, 320), [7, 7, 4]),
        ((160, 96), [6, 3, 2]),
    ],
)
def test_windows_fit_the_map(img_size: int | tuple[int, int], expected: list[int]) -> None:
    model = zoo.create_model("efficientvit_m0", img_size=img_size)
    assert windows(model) == expected
    for stage, side in zip(model.stages, expected, strict=True):
        tables = [p for key, p in stage.named_parameters() if key.endswith("attention_biases")]
        assert tables
        assert all(table.shape == (4, side * side) for table in tables)


@pytest.mark.parametrize("img_size", [(224, 320), (160, 96)])
def test_not_square(img_size: tuple[int, int], randomise: Callable) -> None:
    """A model for a size that is not square is one for the square of its shorter side."""
    wide = randomise(zoo.create_model("efficientvit_m1", img_size=img_size))
    square = zoo.create_model("efficientvit_m1", img_size=min(img_size)).eval()
    square.load_state_dict(wide.state_dict())
    with torch.no_grad():
        assert torch.equal(wide(images(*img_size)), square(images(*img_size)))
        tall = wide(images(*reversed(img_size)))
        assert tall.shape == (1, 1000)
        assert tall.isfinite().all()


def test_bias_tables_are_resampled_by_load_state_dict(randomise: Callable, caplog: pytest.LogCaptureFixture) -> None:
    small = randomise(zoo.create_model("efficientvit_m0"))
    large = zoo.create_model("efficientvit_m0", img_size=512)
    with caplog.at_level(logging.INFO, logger="zoo"):
        large.load_state_dict(small.state_dict(), strict=True)
    key = "stages.2.blocks.0.mixer.m.attn.attention_biases"
    assert f"{key} resampled from 16 to 49 entries" in caplog.messages
    table, resampled = small.state_dict()[key], large.state_dict()[key]
    assert_close(resampled, resize_rel_pos_bias_table_levit(table.T, (49, 4)).T)
    with pytest.raises(RuntimeError, match="size mismatch"):  # other heads are another model, not another size
        large.load_state_dict({**small.state_dict(), key: torch.zeros(3, 16)})


def test_set_input_size(randomise: Callable) -> None:
    weights = randomise(zoo.create_model("efficientvit_m0")).state_dict()
    model, built = zoo.create_model("efficientvit_m0"), zoo.create_model("efficientvit_m0", img_size=512)
    model.load_state_dict(weights)
    built.load_state_dict(weights)
    model.requires_grad_(False)
    model.eval().set_input_size(512)
    assert model.config == built.config
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(images(512)), built.eval()(images(512)))
    model.to(torch.bfloat16).set_input_size((96, 128))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert windows(model) == [6, 3, 2]
    assert model(images(96, 128).bfloat16()).isfinite().all()


def test_nothing_is_cached(randomise: Callable) -> None:
    """The biases that count are those of now: in eval mode, after an in-place change, a load and a cast."""
    model = randomise(zoo.create_model("efficientvit_m0"))
    with torch.no_grad():
        first = model(images(64))
        for key, p in model.named_parameters():
            if key.endswith("attention_biases"):
                p.add_(torch.arange(p.numel()).view(p.shape).sin())
        changed = model(images(64))
        assert not torch.allclose(changed, first, atol=1e-3)
        fresh = zoo.create_model("efficientvit_m0").eval()
        fresh(images(64))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(images(64)), changed)
        assert model.bfloat16()(images(64).bfloat16()).dtype == torch.bfloat16


def test_fused_model_keeps_its_bias_through_moves_and_loads(randomise: Callable) -> None:
    fused = randomise(zoo.create_model("efficientvit_m0")).fuse()
    key = "stages.0.blocks.0.mixer.m.attn.attention_biases"
    assert fused.state_dict()[key].shape == (4, 49, 49)
    other = copy.deepcopy(fused)
    other.load_state_dict({name: tensor + 1.0 for name, tensor in fused.state_dict().items()})
    assert torch.equal(other.get_buffer(key), fused.get_buffer(key) + 1.0)
    assert fused.to(torch.float64).get_buffer(key).dtype == torch.float64


def test_stochastic_depth_rises_over_the_blocks() -> None:
    model = zoo.create_model("efficientvit_m0", drop_path_rate=0.5)
    rates = [block.mixer.drop_path for stage in model.stages for block in stage.blocks]
    assert isinstance(rates[0], torch.nn.Identity)
    assert [drop.rate for drop in rates[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_stochastic_depth_acts_in_training_only(randomise: Callable) -> None:
    model = randomise(zoo.create_model("efficientvit_m0", drop_path_rate=0.5))
    plain = zoo.create_model("efficientvit_m0").eval()
    plain.load_state_dict(model.state_dict())
    x = images(64, batch=2)
    assert torch.equal(model(x), plain(x))
    for module in model.modules():
        module.training = type(module).__name__ == "DropPath"
    assert not torch.equal(model(x), model(x))


def test_initialisation_after_to_empty(initialised_again: Callable) -> None:
    """A model built on the meta device and initialised there is like one that was never there."""
    torch.manual_seed(0)
    expected = zoo.create_model("efficientvit_m0")
    model = initialised_again(expected)
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if q.numel() >= 1000:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.2, abs=1e-8), key
        elif not q.std() > 0:  # constants: weights and biases of norms, bias tables
            assert torch.equal(p, q), key
        assert p.isfinite().all(), key
    for (key, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert model.eval()(images(64)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (64, 128)}, "widths has 2, depths has 3"),
        ({"widths": (60, 128, 192)}, "multiple of 8"),
        ({"num_heads": (4, 3, 4)}, r"widths\[1\] is 128, which num_heads\[1\]=3 does not divide"),
        ({"num_heads": (8, 4, 4)}, "kernel_sizes has 4 entries"),
        ({"kernel_sizes": (5, 5, 4, 5)}, "odd sizes"),
        ({"depths": (1, 0, 3)}, "positive"),
        ({"img_size": 16}, "at least 32 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientViTConfig(**changes)
