"""Every recipe that zoo ships: it resolves, names what exists, and its model learns from made data."""

from pathlib import Path

import pytest

import zoo
from zoo.registry import family_name, split_name
from zoo.train.engine import train
from zoo.train.recipe import find_recipe, list_recipes, load_recipe

NAMES = [name for name in list_recipes() if not name.startswith("_base/")]


def test_there_are_recipes() -> None:
    assert "quickstart" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_says_how_it_is_run(name: str) -> None:
    header = find_recipe(name).read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"{name}" in header


@pytest.mark.parametrize("name", NAMES)
def test_names_a_model_and_weights_that_exist(name: str) -> None:
    model = load_recipe(name).model
    zoo.get_config(model.name).override(**model.overrides)
    if model.pretrained:
        assert zoo.get_weights(model.name).preprocessing


# By family, what makes a language model small.
SMALL = {"matmulfree": {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}}


@pytest.mark.parametrize("name", NAMES)
def test_trains_two_steps_of_its_model(name: str, class_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    changes = {
        "model.overrides": recipe.model.overrides | {"img_size": 32},
        "data.name": str(class_folder),
        "data.root": "",
        "data.holdout": 0.2,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "train.batch_size": 24,
        "train.from_scratch": False,
    }
    if recipe.task == "language-modelling":
        text = tmp_path / "text.txt"
        text.write_text("All the world's a stage, and all the men and women merely players. " * 16)  # 1,072 bytes
        changes |= {
            "model.overrides": recipe.model.overrides | SMALL[family_name(split_name(recipe.model.name)[0])],
            "data.name": str(text),
            "data.tokenizer": "bytes",
            "data.seq_len": 16,
            "train.precision": "fp32",
        }
    if recipe.model.pretrained and not zoo.get_weights(recipe.model.name).packaged:
        changes["model.pretrained"] = False  # tests use no network
        changes["model.name"] = split_name(recipe.model.name)[0]
    result = train(recipe.replace(**changes), tmp_path / "run", quiet=True)
    assert result.metrics["loss"] > 0
    assert (result.folder / "metrics.csv").read_text().splitlines()[1].startswith("1,2,")
