"""Weights carried over to a scaled network."""

import pytest
import torch

import zoo
from zoo.scaling import Factors, fit, grow, resize

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(randomise):
    config = zoo.get_config("efficientnet_b0").override(
        depths=(1, 1, 2), widths=(16, 24, 40), strides=(1, 2, 2), kernel_sizes=(3, 3, 5), expand_ratios=(1, 6, 6),
        stem_width=16, head_width=64, num_classes=5,
    )  # fmt: skip
    return randomise(zoo.build(config))


def test_twice_as_wide_computes_the_same(small) -> None:
    model = grow(small, resize(small.config, Factors(width=2.0)), noise=0.0).eval()
    assert model.config.widths == (32, 48, 80)
    assert not model.growth.fresh
    with torch.no_grad():
        expected = small(IMAGES)
        torch.testing.assert_close(model(IMAGES), expected, atol=2e-5, rtol=1e-4)
        noisy = grow(small, model.config).eval()(IMAGES)
    assert 0 < (noisy - expected).abs().max() < 0.5 * expected.std()  # repeated channels can part


def test_deeper_repeats_blocks_of_its_own_stage(small) -> None:
    model = zoo.scale(small, "depth", factor=2.0, weights="grow")
    growth = model.growth
    assert model.config.depths == (2, 2, 4)
    assert torch.equal(model.blocks[2][3].conv_dw.weight, small.blocks[2][1].conv_dw.weight)
    assert all(name.startswith("blocks.") for name in growth.repeated)
    names = [name for kind in vars(growth).values() for name in kind]
    assert sorted(names) == sorted(model.state_dict())
    # Stage 1 had one block, which widens: the second one's input has another width.
    assert "blocks.1.1.conv_pw.weight" in growth.stretched


def test_same_config_copies_everything(small) -> None:
    model = grow(small, small.config)
    assert set(model.growth.copied) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), small(IMAGES))
    assert "nothing newly initialised" in str(model.growth)


def test_positions_are_resampled(randomise) -> None:
    small = randomise(zoo.create_model("efficientvit_m0", num_classes=3, img_size=112))
    model = zoo.scale(small, "resolution", factor=4.0, weights="grow")
    assert model.config.img_size == 224
    assert model.growth.resampled
    assert all(name.endswith("attention_biases") for name in model.growth.resampled)
    assert not model.growth.fresh


def test_what_is_new_is_named(randomise) -> None:
    small = zoo.build(zoo.get_config("efficientformer_l1").override(depths=(1, 1, 1, 2), num_classes=3))
    model = zoo.scale(small, "depth", factor=2.0, weights="grow")
    assert model.config.attention_depths == (0, 0, 0, 2)
    state = {name for kind in ("copied", "repeated", "stretched", "resampled") for name in getattr(model.growth, kind)}
    assert state | set(model.growth.fresh) == set(model.state_dict())


def test_language_models_grow(randomise) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    small = randomise(zoo.build(zoo.get_config("matmulfree_2m").override(**sizes)))
    model = zoo.scale(small, "depth", factor=2.0, weights="grow")
    new = model.model.layers
    assert len(new) == 4
    assert torch.equal(new[1].mlp.down_proj.weight, small.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(new[3].mlp.down_proj.weight, small.model.layers[1].mlp.down_proj.weight)
    assert not model.growth.fresh
    assert set(model.growth.stretched) == {"model.lower_bounds"}  # [L, D]: a row for each layer


def test_bad_sources(small) -> None:
    with pytest.raises(zoo.ConfigError, match=r"config is of EfficientViT.*weights are of EfficientNet"):
        grow(small, zoo.get_config("efficientvit_m0"))
    with pytest.raises(zoo.ConfigError, match="holds no weights"):
        zoo.scale(zoo.get_config("efficientnet_b0"), factor=2.0, weights="grow")
    with pytest.raises(zoo.ConfigError, match="or weights='grow'"):
        zoo.scale(small, factor=2.0)
    with pytest.raises(zoo.WeightsError):
        zoo.scale("efficientnet_b7", factor=2.0, weights="grow")
    assert fit("regnety_004", factor=1.0).config == zoo.get_config("regnety_004")
