"""RegNetY against timm's class, and pycls' scaler on it (../shared/reference/scaling.md)."""

import pytest
import timm
import torch
from timm.models.regnet import adjust_widths_groups_comp, generate_regnet, model_cfgs
from torch import nn

import zoo
from zoo.families.regnet import FAMILY
from zoo.scaling import counts_of, fit


@pytest.mark.parametrize("name", FAMILY.variants)
def test_the_papers_rule_for_widths(name: str) -> None:
    cfg, config = model_cfgs[name], zoo.get_config(name)
    per_block, stages, groups = generate_regnet(cfg.wa, cfg.w0, cfg.wm, cfg.depth, cfg.group_size)
    widths, groups = adjust_widths_groups_comp(sorted(set(per_block)), [1] * stages, groups)
    assert config.widths == tuple(widths)
    assert config.group_sizes == tuple(groups)
    assert config.depths == tuple(per_block.count(width) for width in sorted(set(per_block)))


def test_equals_timm(randomise) -> None:
    theirs = randomise(timm.create_model("regnety_004"))
    ours = zoo.create_model("regnety_004").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(images)
        assert torch.equal(logits, theirs(images))
        assert [level["module"] for level in ours.feature_info] == ["s1", "s2", "s3", "s4"]
        torch.testing.assert_close(ours.fuse()(images), logits, atol=2e-5 * max(1, float(logits.std())), rtol=0)


# pycls' scaler and complexity code: base, s, rule, crop, depths, widths, group, GMACs, M parameters, M activations.
# pycls names a rule under which groups grow with width dwr_g and so on; here, rules by name let them grow.
ROWS = [
    ("040", 4, "d", 224, (8, 24, 48, 8), (128, 192, 512, 1088), 64, 15.248, 80.92, 39.48),
    ("040", 4, "w", 224, (2, 6, 12, 2), (256, 384, 1024, 2176), 128, 15.730, 80.24, 24.17),
    ("040", 4, "r", 448, (2, 6, 12, 2), (128, 192, 512, 1088), 64, 15.882, 20.65, 49.11),
    ("040", 4, "dwr", 284, (3, 10, 19, 3), (160, 240, 640, 1360), 80, 15.778, 49.39, 35.78),
    ("040", 4, "d1_w8_g8_r1", 240, (2, 7, 14, 2), (224, 336, 896, 1904), 112, 15.608, 68.14, 26.54),
    ("040", 16, "dwr", 356, (5, 15, 30, 5), (208, 312, 832, 1768), 104, 67.197, 132.80, 109.32),
    ("040", 16, "d1_w8_g8_r1", 256, (3, 8, 16, 3), (384, 576, 1536, 3264), 192, 62.682, 250.02, 60.70),
    ("004", 4, "fast", 240, (1, 3, 7, 7), (80, 192, 352, 768), 16, 1.573, 14.59, 7.92),
    ("004", 16, "fast", 256, (1, 4, 8, 8), (144, 312, 624, 1344), 24, 5.706, 49.35, 16.67),
    ("008", 4, "fast", 240, (1, 3, 9, 2), (128, 224, 576, 1344), 32, 3.181, 19.86, 11.15),
    ("008", 16, "fast", 256, (1, 4, 11, 3), (192, 384, 960, 2304), 48, 11.950, 74.50, 23.36),
    ("040", 1, "fast", 224, (2, 6, 12, 2), (128, 192, 512, 1088), 64, 3.973, 20.65, 12.29),
    ("004", 1, "fast", 224, (1, 3, 6, 6), (48, 104, 208, 440), 8, 0.402, 4.34, 3.89),
    ("008", 1, "fast", 224, (1, 3, 8, 2), (64, 128, 320, 768), 16, 0.797, 6.26, 5.25),
]


@pytest.mark.parametrize("base, s, rule, crop, depths, widths, group, macs, params, activations", ROWS)
def test_pycls_rows(base, s, rule, crop, depths, widths, group, macs, params, activations) -> None:
    config = fit(f"regnety_{base}", rule, factor=s).config
    assert (config.img_size, config.depths, config.widths) == (crop, depths, widths)
    assert config.group_sizes == (group,) * 4
    counts = counts_of(config)
    # The difference: pycls counts adding a bias as a multiply-accumulate. All biases here are at single positions.
    layers = [each for each in zoo.build(config, device="meta").modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    counted = counts.macs + sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    assert round(counted / 1e9, 3) == macs
    assert round(counts.params / 1e6, 2) == params
    assert round(counts.activations / 1e6, 2) == activations


def test_groups_grow_where_they_are_named() -> None:
    assert fit("regnety_040", "d1_w8_r1", factor=4).config.group_sizes == (64,) * 4
    narrow = fit("regnety_040", "w", factor=0.1).config
    assert all(width % group == 0 for width, group in zip(narrow.widths, narrow.group_sizes, strict=True))


def test_bad_config() -> None:
    with pytest.raises(zoo.ConfigError, match=r"widths\[1\] is 100.*the nearest are 96 and 104"):
        zoo.get_config("regnety_004").override(widths=(48, 100, 208, 440))
    with pytest.raises(zoo.ConfigError, match="expected 4, one per stage"):
        zoo.get_config("regnety_004").override(depths=(1,), widths=(48,), group_sizes=(8,))
