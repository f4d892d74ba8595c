"""Every recipe that zoo ships: it resolves, names what exists, and its model learns from made data."""

import math
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
from zoo.train.recipe import Recipe, find_recipe, leaves, list_recipes, load_recipe
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


# By family, what makes a language model small.
SMALL = {
    "matmulfree": {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "mixture_of_recursions": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def _reduced(recipe: Recipe, data: Path) -> Recipe:
    """The recipe for the smallest model of the family, on 48 pictures of 32 pixels, or on rows of 32 bytes."""
    variant = split_name(recipe.model.name)[0]
    pictures = recipe.task == "image-classification"
    sizes = {"img_size": 32} if pictures else SMALL[zoo.registry.family_name(variant)]
    changes: dict[str, Any] = {
        "model.overrides": recipe.model.overrides | sizes,
        "data.name": str(data) if pictures else "tinyshakespeare",
        "data.tokenizer": "bytes",
        "data.seq_len": 32,
        "data.root": "",
        "data.val_split": "",
        "data.holdout": 0.2,
        "data.workers": 0,
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
    if not recipe.model.pretrained:
        family = zoo.registry.family_name(variant)
        by_size = {entry["params"]: name for name, entry in index().items() if zoo.registry.family_name(name) == family}
        changes["model.name"] = by_size[min(by_size)]
    elif not zoo.get_weights(recipe.model.name).packaged:  # tests use no network
        changes["model.name"] = "efficientvit_m0.zoo_cifar10"
    return recipe.replace(**changes)


def _path(recipe: Recipe) -> tuple[Any, ...]:
    """What a recipe makes the loop do: two that differ only in numbers that are not 0 do the same."""
    return tuple((key, _kind(value)) for key, value in leaves(recipe) if not key.startswith("model."))


def _kind(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _kind(inner)) for key, inner in value.items())
    return bool(value) if isinstance(value, int | float | tuple) else value


def _distinct() -> list[str]:
    """Recipes that have every path of the loop and every family among them."""
    chosen, paths, families = [], set(), set()
    for name in NAMES:
        recipe = _reduced(load_recipe(name), Path("made"))
        path, family = _path(recipe), zoo.registry.family_name(split_name(recipe.model.name)[0])
        if path not in paths or family not in families:
            chosen.append(name)
        paths.add(path)
        families.add(family)
    return chosen


@pytest.mark.parametrize("name", _distinct())
def test_trains_two_steps_of_its_model(
    name: str, class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "load_teacher", _untrained_teacher)
    run = _Run(_reduced(load_recipe(name), class_folder), RunFolder(tmp_path), quiet=True)
    before = {key: tensor.clone() for key, tensor in run.plain_model.named_parameters() if tensor.requires_grad}
    run.model.train()
    run.train_loader.set_epoch(0)
    run.progress.start_epoch()
    batches = iter(run.train_loader)
    for _ in range(2):
        run._step(batches)
    assert run.step == 2
    assert math.isfinite(run.loss_sum)
    assert run.loss_sum > 0
    changed = [
        key for key, tensor in run.plain_model.named_parameters() if key in before and (tensor != before[key]).any()
    ]
    assert len(changed) > 0.5 * len(before)


def _untrained_teacher(name: str) -> Classifier:
    torch.manual_seed(0)
    model = zoo.create_model("efficientvit_m0", num_classes=3, img_size=32).eval()
    return Classifier(model, Preprocessing(img_size=(32, 32)), ("blue", "green", "red"))
