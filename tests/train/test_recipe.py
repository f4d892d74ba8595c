"""Recipes: what is read, merged, overridden and refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.errors import RecipeError
from zoo.train.recipe import Recipe, find_recipe, list_recipes, load_recipe, resolve

MINIMAL = '[model]\nname = "efficientvit_m0"\n[data]\nname = "digits"\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_what_is_left_out_has_its_default(write: Callable) -> None:
    recipe = load_recipe(write(MINIMAL))
    assert recipe == resolve({"model": {"name": "efficientvit_m0"}, "data": {"name": "digits"}}, "here")
    assert recipe.optim == Recipe().optim


def test_every_unknown_key_is_named_at_once_with_the_nearest(write: Callable) -> None:
    path = write(MINIMAL + "[optim]\nweight_decey = 0.1\nzzzzzz = 1\n[train]\nlr = 1\n[trian]\nbatch_size = 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}: unknown key optim.weight_decey (did you mean optim.weight_decay?); unknown key optim.zzzzzz; "
        "unknown key train.lr (did you mean optim.lr?); unknown key trian (did you mean train?)."
    )


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("optim.lr", "fast", "optim.lr is 'fast', expected a number"),
        ("optim.lr", True, "optim.lr is True, expected a number"),
        ("schedule.epochs", 1.5, "schedule.epochs is 1.5, expected an integer"),
        ("train.tensorboard", "yes", "train.tensorboard is 'yes', expected true or false"),
        ("data.name", 3, "data.name is 3, expected text"),
        ("augment.scale", [0.5], "augment.scale is [0.5], expected a list of 2 numbers"),
        ("augment.scale", ["a", 1.0], "augment.scale is ['a', 1.0], expected a list of 2 numbers"),
        ("model.overrides", 3, "model.overrides is 3, expected a table"),
        ("optim", 3, "optim is 3, expected a table"),
        ("seed", -1, "seed is -1, expected 0 or more"),
        ("optim.betas", [0.9], "optim.betas is [0.9], expected empty, or two of 0 or more, less than 1"),
        ("optim.betas", [0.9, 1.0], "optim.betas is [0.9, 1.0], expected empty, or two of 0 or more, less than 1"),
        ("optim.betas", "fast", "optim.betas is 'fast', expected a list of numbers"),
        ("optim.lr", 0.0, "optim.lr is 0.0, expected more than 0"),
        ("optim.lr", float("nan"), "optim.lr is nan, expected more than 0"),
        ("optim.clip", float("inf"), "optim.clip is inf, expected 0 or more"),
        ("schedule.epochs", 0, "schedule.epochs is 0, expected 1 or more"),
        ("data.holdout", 1.0, "data.holdout is 1.0, expected more than 0, less than 1"),
        ("data.crop_pct", 1.5, "data.crop_pct is 1.5, expected 0 to 1"),
        ("train.ema", 1.0, "train.ema is 1.0, expected 0 or more, less than 1"),
        ("augment.scale", [1.0, 0.5], "augment.scale is [1.0, 0.5], expected two shares of 1, the smaller first"),
        ("train.precision", "int8", "train.precision is 'int8', expected 'fp32' or 'bf16' or 'fp16'"),
        ("data.interpolation", "cubic", "data.interpolation is 'cubic', expected 'bicubic' or 'bilinear' or 'nearest'"),
        ("task", "detection", "task is 'detection', expected 'image-classification' or 'language-modelling'"),
        ("model.name", "", "model.name is empty, expected a model (`zoo list` shows them)"),
        ("data.name", "", "data.name is empty, expected a data set"),
        ("schedule.warmup_epochs", 10, "schedule.warmup_epochs is 10, expected less than the 10 epochs"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(key: str, value: object, expected: str) -> None:
    recipe = resolve({"model": {"name": "efficientvit_m0"}, "data": {"name": "digits"}}, "here")
    with pytest.raises(RecipeError) as caught:
        recipe.replace(**{key: value})
    assert str(caught.value) == f"recipe: {expected}."


def test_all_wrong_values_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve({"model": {"name": 1}, "seed": "x", "optim": {"lr": "y"}}, "here")
    for key in ("model.name is 1", "seed is 'x'", "optim.lr is 'y'"):
        assert key in str(caught.value)


def test_settings_that_contradict(tiny_recipe: Callable) -> None:
    with pytest.raises(RecipeError, match=r"model has both pretrained and checkpoint, expected one of them.$"):
        tiny_recipe(**{"model.pretrained": True, "model.checkpoint": "a.safetensors"})
    with pytest.raises(RecipeError, match=r"train.from_scratch compares with pretrained weights, but model has "):
        tiny_recipe(**{"train.from_scratch": True})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim.name": "lamb"}, r"optim.name is 'lamb', expected one of adam, adamw, .* with DeepSpeed.$"),
        (
            {"optim.clip": 1.0, "optim.clip_mode": "value"},
            r"optim.clip_mode is 'value', expected 'norm' with DeepSpeed.$",
        ),
        ({"train.precision": "fp16"}, r"train.precision is 'fp16', expected 'bf16' or 'fp32' with DeepSpeed.$"),
    ],
)
def test_what_deepspeed_does_not_do(tiny_recipe: Callable, changes: dict, message: str) -> None:
    tiny_recipe(**changes)
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(**changes, **{"train.sharding": "zero2"})


def test_a_base_is_merged_key_by_key(write: Callable) -> None:
    write(MINIMAL + "[optim]\nlr = 1.0\nclip = 2.0\n[augment]\nscale = [0.1, 0.2]\n", "common.toml")
    recipe = load_recipe(write('base = "common"\n[optim]\nlr = 3.0\n[augment]\nscale = [0.5, 0.6]\n'))
    assert (recipe.optim.lr, recipe.optim.clip) == (3.0, 2.0)
    assert recipe.augment.scale == (0.5, 0.6)
    assert recipe.model.name == "efficientvit_m0"


def test_a_base_may_lie_elsewhere_or_be_one_that_zoo_ships(write: Callable, tmp_path: Path) -> None:
    (tmp_path / "_base").mkdir()
    write(MINIMAL, "_base/common.toml")
    assert load_recipe(write('base = "_base/common.toml"\n')).data.name == "digits"
    assert load_recipe(write('base = "quickstart"\n')) == load_recipe("quickstart")


def test_one_level_of_base_is_all_there_is(write: Callable) -> None:
    write(MINIMAL, "first.toml")
    write('base = "first"\n', "second.toml")
    with pytest.raises(RecipeError, match=r"its base .*second.toml has a base itself; one level is all there is.$"):
        load_recipe(write('base = "second"\n'))
    with pytest.raises(RecipeError, match=r"recipe.toml: its base is missing. No recipe 'quickstrt': .*quickstart"):
        load_recipe(write('base = "quickstrt"\n'))
    with pytest.raises(RecipeError, match=r"recipe.toml: base is 3, expected the name of a recipe.$"):
        load_recipe(write("base = 3\n"))


def test_overrides_of_every_kind(write: Callable) -> None:
    overrides = [
        "optim.lr=1e-4",
        "schedule.epochs=3",
        "optim.clip=1",
        "train.from_scratch=true",
        "model.pretrained=true",
        "augment.scale=[0.5, 1]",
        "data.name=owner/name",
        "data.root = /some/place with blanks",
        'data.test_split="test"',
        "model.overrides.img_size=[64, 96]",
        "model.overrides={drop_path_rate = 0.1}",
        "model.overrides.drop_rate=0.2",
        "augment.auto_augment=",
    ]
    recipe = load_recipe(write(MINIMAL), overrides)
    assert (recipe.optim.lr, recipe.schedule.epochs, recipe.optim.clip) == (1e-4, 3, 1.0)
    assert recipe.train.from_scratch is True
    assert recipe.augment.scale == (0.5, 1.0)
    assert recipe.data.name == "owner/name"
    assert recipe.data.root == "/some/place with blanks"
    assert recipe.data.test_split == "test"
    assert recipe.model.overrides == {"drop_path_rate": 0.1, "drop_rate": 0.2}
    assert recipe.augment.auto_augment == ""


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr", r"^Override 'optim.lr': expected section.key=value, such as optim.lr=1e-3.$"),
        ("=3", r"^Override '=3': expected section.key=value"),
        ("seed.x=1", r"^Override 'seed.x': 'seed' is not a table.$"),
        ("optim.wieght_decay=1", r"unknown key optim.wieght_decay \(did you mean optim.weight_decay"),
    ],
)
def test_overrides_that_make_no_sense(write: Callable, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write("seed = 1\n" + MINIMAL), [override])


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^No recipe 'quikstart': neither a file nor a name. Nearest: quickstart"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match=r"^No recipe '.*': neither a file nor a name. Nearest: "):
        load_recipe(tmp_path)  # a folder


def test_damaged_toml_is_one_line(write: Callable, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^/.*recipe.toml is not valid TOML: [^\n]+\.$"):
        load_recipe(write("seed = = 1"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"binary.toml is not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


def test_shipped_recipes_are_found_by_name() -> None:
    assert {"quickstart", "cifar10/efficientvit_m0"} <= set(list_recipes())
    path = find_recipe("quickstart")
    for name in ("quickstart.toml", "recipes/quickstart.toml"):
        assert find_recipe(name).samefile(path)
    assert find_recipe(path) == path


@pytest.mark.parametrize("name", ["quickstart", "cifar10/efficientvit_m0"])
def test_toml_and_back(name: str, write: Callable) -> None:
    recipe = load_recipe(name, ["model.overrides.depths=[1, 2, 3]", "optim.lr=1.2345678901234567e-05"])
    assert load_recipe(write(recipe.to_toml())) == recipe
