"""Every recipe that zoo ships: it resolves, names what exists, and its model learns from made data."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.inference import Classifier
from zoo.preprocessing import Preprocessing
from zoo.registry import index, split_name
from zoo.train import distill
from zoo.train.engine import _Run
from zoo.train.provenance import explain, find_problems
from zoo.train.recipe import Recipe, find_recipe, list_recipes, load_recipe
from zoo.train.run_folder import RunFolder

NAMES = list_recipes()


def test_every_recipe_passes_the_check() -> None:
    assert "quickstart" in NAMES
    assert [problem for name in NAMES for problem in find_problems(name)] == []


def test_every_image_variant_has_the_recipe_of_its_authors() -> None:
    trained = {load_recipe(name).model.name for name in NAMES if "-in1k" in name}
    pictures = {name for name, entry in index().items() if entry["task"] == "image-classification"}
    assert trained == pictures - {"anynet"}  # which has no authors


@pytest.mark.parametrize("name", [name for name in NAMES if "-in1k" in name])
def test_says_what_was_published_and_whether_it_was_distilled(name: str) -> None:
    header = find_recipe(name).read_text().split("\n\n")[0]
    assert "Published:" in header
    assert "Source" in header
    assert "Cost:" in header
    if load_recipe(name).distill.teacher:
        assert "distillation" in header


def test_every_value_has_an_origin() -> None:
    origins = {each.key: each.origin for each in explain("lowformer/lowformer_b0-in1k", ["optim.clip=1", "seed=3"])}
    assert origins["model.overrides.drop_path_rate"] == "paper"
    assert origins["train.batch_size"] == "ours"  # marked so
    assert origins["optim.weight_decay"] == "base: paper"
    assert origins["data.workers"] == "base: ours"
    assert origins["optim.clip"] == origins["seed"] == "override"
    assert origins["optim.momentum"] == "default"
    assert {each.origin for each in explain("quickstart")} == {"ours", "default"}


# By family, what makes a language model narrow.
NARROW = {
    "matmulfree": {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48},
    "mixture_of_recursions": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def _reduced(recipe: Recipe, data: Path) -> Recipe:
    """The recipe's own model with one block in every stage, on 9 pictures of 32 pixels; or narrow, on rows of 32 bytes.

    Pretrained weights keep their depth.
    """
    name = recipe.model.name
    pictures = recipe.task == "image-classification"
    if recipe.model.pretrained and not zoo.get_weights(name).packaged:  # tests use no network
        name = "efficientvit_m0.zoo_cifar10"
    overrides = recipe.model.overrides | (
        {"img_size": 32} if pictures else NARROW[zoo.registry.family_name(split_name(name)[0])]
    )
    if not recipe.model.pretrained:
        overrides |= _shallow(zoo.get_config(name).override(**overrides))
    changes: dict[str, Any] = {
        "model.name": name,
        "model.overrides": overrides,
        "data.name": str(data),
        "data.tokenizer": "bytes",
        "data.seq_len": 32,
        "data.root": "",
        "data.val_split": "",
        "data.holdout": 0.85,
        "data.workers": 0,
        "data.prune_fraction": 0.1,
        "augment.sizes": [32, 48] if recipe.augment.sizes else [],
        "distill.start": 0.0,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "schedule.decay_epochs": min(recipe.schedule.decay_epochs, 1.0),
        "train.batch_size": 4,
        "train.sync_bn": False,
        "train.precision": "fp32",
        "train.tensorboard": False,
        "train.from_scratch": False,
    }
    return recipe.replace(**changes)


def _shallow(config: zoo.ModelConfig) -> dict[str, Any]:
    """The fields that leave one block in every stage, or one layer."""
    depths = {}
    for spec in dataclasses.fields(config):
        if "axis" in spec.metadata and spec.metadata["axis"].dimension == "depth":
            depth = getattr(config, spec.name)
            depths[spec.name] = (1,) * len(depth) if isinstance(depth, tuple) else 1
    return config.fit(depths)


@pytest.fixture(scope="module")
def few_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of which 9 rows of 32 bytes are trained on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(120)))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_trains_two_steps_of_its_model(
    name: str,
    class_folder: Path,
    few_lines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed_in_an_epoch: Callable,
) -> None:
    monkeypatch.setattr(distill, "load_teacher", _untrained_teacher)
    recipe = load_recipe(name)
    data = class_folder if recipe.task == "image-classification" else few_lines
    run = _Run(_reduced(recipe, data), RunFolder(tmp_path), quiet=True)
    changed = changed_in_an_epoch(run)
    assert run.step == 2
    assert run.loss_sum > 0
    trained = {key for key, parameter in run.plain_model.named_parameters() if parameter.requires_grad}
    assert len(changed & trained) > 0.5 * len(trained)


@cache
def _untrained_teacher(name: str) -> Classifier:
    torch.manual_seed(0)
    model = zoo.create_model("efficientvit_m0", num_classes=3, img_size=32).eval()
    return Classifier(model, Preprocessing(img_size=(32, 32)), ("blue", "green", "red"))
