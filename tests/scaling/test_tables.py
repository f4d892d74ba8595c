"""The published and executed tables: ../shared/reference/scaling.md and tinynet.md say where each figure is from."""

import math
import random
from typing import Any

import pytest
from torch import nn

import zoo
from zoo.axes import EFFICIENTNET, TINYNET
from zoo.scaling import Factors, counts_of, fit, resize

B0_WIDTHS = (32, 16, 24, 40, 80, 112, 192, 320, 1280)
B0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)

# pycls' scaler and complexity code on its EfficientNet-B0: s, rule, crop, depths, widths from stem to last convolution,
# GMACs, M parameters, M activations. None: as the base.
EFFICIENTNET_ROWS = [
    (2, "d", 224, (2, 4, 4, 6, 6, 8, 2), None, 0.782, 10.22, 12.09),
    (2, "w", 224, None, (48, 24, 32, 56, 112, 160, 272, 456, 1808), 0.746, 9.72, 9.62),
    (2, "r", 316, None, None, 0.781, 5.29, 13.56),
    (2, "dw", 224, (1, 3, 3, 4, 4, 6, 1), (40, 16, 32, 48, 96, 136, 232, 384, 1520), 0.760, 9.51, 10.71),
    (2, "dr", 268, (1, 3, 3, 4, 4, 6, 1), None, 0.801, 6.82, 13.01),
    (2, "wr", 268, None, (40, 16, 32, 48, 96, 136, 232, 384, 1520), 0.839, 7.30, 11.76),
    (2, "dwr", 252, (1, 3, 3, 4, 4, 5, 1), (32, 16, 24, 48, 88, 128, 216, 360, 1440), 0.792, 7.68, 11.92),
    (2, "d1_w8_r1", 232, None, (40, 24, 32, 56, 104, 144, 256, 424, 1688), 0.782, 8.60, 10.19),
    (4, "d", 224, (4, 8, 8, 12, 12, 16, 4), None, 1.575, 20.09, 22.78),
    (4, "w", 224, None, (64, 32, 48, 80, 160, 224, 384, 640, 2560), 1.450, 18.12, 13.50),
    (4, "r", 448, None, None, 1.538, 5.29, 26.96),
    (4, "dw", 224, (2, 4, 4, 6, 6, 8, 2), (48, 24, 32, 56, 112, 160, 272, 456, 1808), 1.510, 19.50, 17.05),
    (4, "dr", 316, (2, 4, 4, 6, 6, 8, 2), None, 1.586, 10.22, 24.34),
    (4, "wr", 316, None, (48, 24, 32, 56, 112, 160, 272, 456, 1808), 1.510, 9.72, 19.33),
    (4, "dwr", 284, (2, 3, 3, 5, 5, 6, 2), (40, 24, 32, 48, 104, 144, 240, 400, 1616), 1.697, 13.23, 21.55),
    (4, "d1_w8_r1", 240, (1, 2, 2, 3, 3, 5, 1), (56, 24, 40, 72, 136, 192, 336, 560, 2232), 1.381, 15.82, 13.33),
    (16, "d", 224, (16, 32, 32, 48, 48, 64, 16), None, 6.333, 79.31, 86.93),
    (16, "w", 224, None, (128, 64, 96, 160, 320, 448, 768, 1280, 5120), 5.613, 66.43, 26.99),
    (16, "r", 896, None, None, 6.144, 5.29, 107.81),
    (16, "dwr", 356, (3, 5, 5, 8, 8, 10, 3), (48, 24, 40, 64, 128, 176, 304, 504, 2032), 6.918, 32.28, 63.88),
    (16, "d1_w8_r1", 256, (1, 3, 3, 4, 4, 5, 1), (96, 48, 72, 120, 240, 336, 584, 968, 3880), 5.478, 47.39, 34.30),
]


def costs(config: zoo.ModelConfig, digits: int) -> tuple[float, float, float]:
    """GMACs, M parameters and M activations, the first to three digits and the others to so many.

    The difference: pycls counts adding a bias as one more multiply-accumulate, zoo as fvcore and timm do not. Here,
    biases are at single positions only: those of squeeze-and-excitation and of the classifier.
    """
    counts = counts_of(config)
    model = zoo.build(config, device="meta")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    macs = counts.macs + sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    return round(macs / 1e9, 3), round(counts.params / 1e6, digits), round(counts.activations / 1e6, digits)


@pytest.mark.parametrize("s, rule, crop, depths, widths, macs, params, activations", EFFICIENTNET_ROWS)
def test_efficientnet_rows(s, rule, crop, depths, widths, macs, params, activations) -> None:
    config = fit("efficientnet_b0", rule, factor=s).config
    assert config.img_size == crop
    assert config.depths == (depths or B0_DEPTHS)
    assert (config.stem_width, *config.widths, config.head_width) == (widths or B0_WIDTHS)
    assert costs(config, 2) == (macs, params, activations)


def test_fast_is_pycls_weights() -> None:
    for s in (0.3, 2, 7.1, 16):
        named, weighted = (fit("efficientnet_b0", rule, factor=s) for rule in ("fast", "d1_w8_g8_r1"))
        assert named.config == weighted.config
        assert named.factors.cost == pytest.approx(weighted.factors.cost)


def pycls_config(base: Any, parts: dict[str, float], s: float) -> dict[str, Any]:
    """The rounding that ../shared/reference/scaling.md states of pycls' scaler, written once more; groups take part."""
    whole = sum(parts.values())
    d, w, r = s ** (parts["d"] / whole), s ** (parts["w"] / whole / 2), s ** (parts["r"] / whole / 2)

    def width(channels: int) -> int:
        return max(8, round(channels * w / 8) * 8)

    values: dict[str, Any] = {
        "depths": tuple(max(1, round(depth * d)) for depth in base.depths),
        "widths": tuple(map(width, base.widths)),
        "img_size": round(base.img_size * r / 4) * 4,
    }
    if hasattr(base, "head_width"):
        return values | {"stem_width": width(base.stem_width), "head_width": width(base.head_width)}
    groups = []
    for group, channels in zip(base.group_sizes, values["widths"], strict=True):
        scaled = max(1, round(group * w))
        scaled = scaled if scaled <= 2 else 4 if scaled <= 5 else round(scaled / 8) * 8
        groups.append(min(scaled, channels))
    widths = (max(g, round(c / g) * g) for g, c in zip(groups, values["widths"], strict=True))
    return values | {"widths": tuple(widths), "group_sizes": tuple(groups)}


@pytest.mark.parametrize("name", ["efficientnet_b0", "regnety_004", "regnety_008", "regnety_040"])
def test_factors_beyond_the_tables(name: str) -> None:
    base, rng = zoo.get_config(name), random.Random(name)
    for _ in range(100):
        parts = {letter: float(rng.randint(0, 9)) for letter in "dwr"}
        parts["d"] += not any(parts.values())
        s = math.exp(rng.uniform(-1.5, 3.5))
        rule = "_".join(f"{letter}{weight:g}" for letter, weight in [*parts.items(), ("g", parts["w"])])
        config = fit(base, rule, factor=s).config
        for field, value in pycls_config(base, parts, s).items():
            assert getattr(config, field) == value, (rule, s, field)


# The official coefficients; repeats, channels, ends and complexity by pycls' configs. The paper and TensorFlow's code
# print 4.2, 9.9, 19 and 37 GMACs for B4 to B7 where these counts are 4.39, 10.3, 19.1 and 37.7; for B6 and B7 nothing
# more exact is published.
COMPOUND_ROWS = [
    ("b1", 1.0, 1.1, 240, (2, 3, 3, 4, 4, 5, 2), B0_WIDTHS, (0.687, 7.794, 10.884)),
    ("b2", 1.1, 1.2, 260, (2, 3, 3, 4, 4, 5, 2), (32, 16, 24, 48, 88, 120, 208, 352, 1408), (0.994, 9.110, 13.833)),
    ("b3", 1.2, 1.4, 300, (2, 3, 3, 5, 5, 6, 2), (40, 24, 32, 48, 96, 136, 232, 384, 1536), (1.827, 12.233, 23.831)),
    ("b4", 1.4, 1.8, 380, (2, 4, 4, 6, 6, 8, 2), (48, 24, 32, 56, 112, 160, 272, 448, 1792), (4.394, 19.342, 49.489)),
    ("b5", 1.6, 2.2, 456, (3, 5, 5, 7, 7, 9, 3), (48, 24, 40, 64, 128, 176, 304, 512, 2048), (10.266, 30.390, 98.857)),
    ("b6", 1.8, 2.6, 528, (3, 6, 6, 8, 8, 11, 3), (56, 32, 40, 72, 144, 200, 344, 576, 2304), None),
    ("b7", 2.0, 3.1, 600, (4, 7, 7, 10, 10, 13, 4), (64, 32, 48, 80, 160, 224, 384, 640, 2560), None),
]


@pytest.mark.parametrize("name, width, depth, side, depths, widths, counted", COMPOUND_ROWS)
def test_efficientnets(name, width, depth, side, depths, widths, counted) -> None:
    config = zoo.scale("efficientnet_b0", rule="compound", width=width, depth=depth, img_size=side)
    assert config == zoo.get_config(f"efficientnet_{name}")
    assert config.depths == depths
    assert (config.stem_width, *config.widths, config.head_width) == widths
    if counted:
        assert costs(config, 3) == counted


@pytest.mark.parametrize("name, phi, side", [("b1", 1, 258), ("b2", 1, 258), ("b3", 2, 296), ("b4", 4, 392)])
def test_published_resolutions_do_not_follow_phi(name: str, phi: int, side: int) -> None:
    """The difference: 240, 260, 300 and 380 px were published, and no whole phi makes them."""
    assert zoo.scale("efficientnet_b0", rule="compound", phi=phi).img_size == side
    assert zoo.get_config(f"efficientnet_{name}").img_size != side


TINY_ROWS = [  # r, w, d, the authors' MMACs, side
    ("a", 0.86, 1.0, 1.2, 339, 192),
    ("b", 0.84, 0.75, 1.1, 202, 188),
    ("c", 0.825, 0.54, 0.85, 100, 184),
    ("d", 0.68, 0.54, 0.695, 52, 152),
    ("e", 0.475, 0.51, 0.60, 24, 106),
]


@pytest.mark.parametrize("name, r, w, d, macs, side", TINY_ROWS)
def test_tinynets(name, r, w, d, macs, side) -> None:
    base, published = zoo.get_config("efficientnet_b0"), zoo.get_config(f"tinynet_{name}")
    config = resize(base, Factors(d, w, r), TINYNET)
    assert config.to_dict() == published.to_dict()
    assert config.img_size == side
    # By the rule alone: the published MACs are met, and resolution and depth are the published ones.
    found = fit("efficientnet_b0", "tiny", macs=macs * 1e6)
    assert abs(found.error) < 0.02
    assert found.factors.resolution == pytest.approx(r, abs=0.01)
    assert found.factors.depth == pytest.approx(d, abs=0.01)
    assert found.config.depths == published.depths


def test_roundings_where_papers_differ() -> None:
    """EfficientNet rounds depths up and widths to no less than 90 %; pycls rounds both to the nearest."""
    base = zoo.get_config("efficientnet_b0")
    factors = Factors(depth=1.2, width=1.15)
    assert resize(base, factors).depths == (1, 2, 2, 4, 4, 5, 1)
    assert resize(base, factors, EFFICIENTNET).depths == (2, 3, 3, 4, 4, 5, 2)
    assert resize(base, Factors(width=0.55)).widths[1] == 16
    assert resize(base, Factors(width=0.8)).stem_width == 24  # 25.6: down to 24, which is above 90 %
    assert resize(base, Factors(width=0.69)).widths[0] == 8  # 11.04
    assert resize(base, Factors(width=0.69), EFFICIENTNET).widths[0] == 16  # 8 is below 90 % of 11.04
