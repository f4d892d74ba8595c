"""Backbones from stages: every block runs, scales, fuses, and a hand-written network is as good as a named one.

That it can be pushed is in tests/pretrained/test_push.py.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def every_block() -> zoo.ModelConfig:
    """A scaled network with all blocks in it."""
    return scaled(BLOCKS)


def scaled(blocks: Iterable[str]) -> zoo.ModelConfig:
    stages = [Stage(block, depth=1, width=16, expand_ratio=2, stride=2 - i % 2) for i, block in enumerate(blocks)]
    return zoo.scale(anynet(stages, num_classes=3, img_size=64), "width", factor=1.7)


@pytest.mark.slow
def test_exported(randomise: Callable, tmp_path: Path) -> None:
    # EfficientVMamba's own tests export the scan, which takes longer than all the rest.
    model = randomise(zoo.build(scaled(block for block in BLOCKS if block != "scan")))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of branches on shapes, while tracing
        expected = model(IMAGES)
        programs = {
            "trace": torch.jit.trace(model, IMAGES, check_trace=False),
            "compile": torch.compile(model, fullgraph=True, backend="eager"),
        }
        for name, program in programs.items():
            torch.testing.assert_close(program(IMAGES), expected, atol=1e-5, rtol=1e-5, msg=name)
    exported = zoo.export(model, "onnx", tmp_path / "out")  # which runs it in onnxruntime
    assert exported.manifest["checks"]
    assert all(check["max_abs"] <= 1e-4 * check["scale"] for check in exported.manifest["checks"])


def test_trained_by_a_recipe(
    every_block: Any, tiny_recipe: Callable, changed_in_an_epoch: Callable, tmp_path: Path
) -> None:
    from zoo.train.engine import _Run
    from zoo.train.run_folder import RunFolder

    recipe = tiny_recipe(**{"model.name": "anynet", "model.overrides": overrides(every_block)})
    run = _Run(recipe, RunFolder(tmp_path), quiet=True)
    assert run.plain_model.config == every_block
    changed = changed_in_an_epoch(run)
    assert run.loss_sum > 0
    parameters = dict(run.plain_model.named_parameters()).keys()
    assert len(changed & parameters) > 0.5 * len(parameters)


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
