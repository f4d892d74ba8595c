"""Backbones from stages: every block runs, scales, fuses, and a hand-written network is saved and loaded by name."""

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo.atomic import save_safetensors
from zoo.builders import BLOCKS, Stage, anynet, overrides
from zoo.scaling import fit

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block: str, randomise) -> None:
    stages = [Stage(block, depth=1, width=16, expand_ratio=2), Stage(block, depth=2, width=24, stride=1)]
    config = anynet(stages, num_classes=5, head_width=32, img_size=64)
    assert zoo.config_from_json(config.to_json()) == config
    model = randomise(zoo.build(config))
    with torch.no_grad():
        logits = model(IMAGES)
        assert logits.shape == (2, 5)
        assert [level["reduction"] for level in model.feature_info] == [4]
        torch.testing.assert_close(model.fuse()(IMAGES), logits, atol=1e-4, rtol=1e-4)
    larger = fit(config, "fast", factor=3.0).config
    assert larger.widths > config.widths
    assert larger.blocks == config.blocks
    assert zoo.build(larger, device="meta").num_features == larger.head_width


def test_mixed_stages_saved_and_loaded(tmp_path: Path) -> None:
    config = anynet([Stage("fused_mbconv", 1, 16), Stage("bottleneck", 1, 32), Stage("pool", 1, 48)], num_classes=3)
    torch.manual_seed(0)
    model = zoo.build(config).eval()
    file = tmp_path / "hybrid.safetensors"
    metadata = {"model": "anynet", "config": json.dumps(overrides(config))}
    save_safetensors(model.state_dict(), file, metadata)
    again = zoo.create_model(str(file), pretrained=True).eval()
    assert again.config == config
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_bad_stages() -> None:
    with pytest.raises(zoo.ConfigError, match=r"blocks\[0\] is 'mbcnv'; expected one of .*Did you mean: mbconv"):
        anynet([Stage("mbcnv", 1, 16)])
    with pytest.raises(zoo.ConfigError, match="at least one"):
        anynet([])
    with pytest.raises(zoo.ConfigError, match="whole number"):
        anynet([Stage("modulation", 1, 16, expand_ratio=1.5)])
    with pytest.raises(zoo.ConfigError, match=r"multiple of group_sizes\[0\]"):
        anynet([Stage("bottleneck", 1, 20, group_size=8)])
    with pytest.raises(zoo.ConfigError, match="no field 'img_sizes'"):
        anynet([Stage("mbconv", 1, 16)], img_sizes=64)
    assert zoo.builders.anynet is anynet
