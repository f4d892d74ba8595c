"""``evaluate_run``: the figures that training saw, from what the run folder holds alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from zoo.errors import DataError, RecipeError, TrainingError, WeightsError
from zoo.train import evaluate
from zoo.train.engine import train
from zoo.train.evaluate import evaluate_run
from zoo.train.tasks import eval_loader


@pytest.mark.parametrize("changes", [{}, {"train.ema": 0.5}, {"train.precision": "bf16"}], ids=str)
def test_the_held_out_figures_are_the_results_to_the_digit(
    tiny_recipe: Callable, tmp_path: Path, changes: dict
) -> None:
    result = train(tiny_recipe(**changes, **{"model.overrides.img_size": 64}), tmp_path / "run", quiet=True)
    figures = evaluate_run(result.folder)
    assert figures == {"split": "heldout", "samples": 12, **result.metrics}
    assert evaluate_run(result.folder) == figures


@pytest.fixture(scope="module")
def run(tiny_recipe: Callable, class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder with a train and a test split."""
    root = tmp_path_factory.mktemp("run")
    for split in ("train", "test"):
        shutil.copytree(class_folder, root / "data" / split)
    for picture in (root / "data" / "test").glob("*/1*.png"):
        picture.unlink()
    recipe = tiny_recipe(**{"data.name": str(root / "data"), "data.test_split": "test", "schedule.epochs": 1})
    return train(recipe, root / "run", quiet=True).folder


def test_the_recipes_test_split_comes_first(run: Path) -> None:
    figures = evaluate_run(run)
    assert (figures["split"], figures["samples"]) == ("test", 30)
    assert evaluate_run(run, split="heldout")["samples"] == 12
    assert evaluate_run(run, split="train")["samples"] == 60


@pytest.mark.parametrize("most", [2, 0])
def test_passes_shrink_until_memory_has_them(run: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    expected, tried, whole = evaluate_run(run), [], evaluate.evaluate

    def limited(model: Any, loader: Any, *options: Any) -> dict[str, float]:
        tried.append(loader.sampler.batch_size)
        if tried[-1] > most:
            raise torch.OutOfMemoryError
        return whole(model, loader, *options)

    monkeypatch.setattr(evaluate, "evaluate", limited)
    if most:
        assert evaluate_run(run) == pytest.approx(expected)
        assert tried == [8, 4, 2]
    else:
        with pytest.raises(TrainingError, match=r"^Out of memory with one sample a pass\.$"):
            evaluate_run(run)


def test_more_processes_than_samples_are_refused(tiny_recipe: Callable) -> None:
    many = cast(Accelerator, SimpleNamespace(num_processes=13, process_index=12))
    message = r"^13 processes are more than the 12 samples to evaluate on; start fewer, or raise data.holdout.$"
    with pytest.raises(RecipeError, match=message):
        eval_loader(cast(Any, range(12)), tiny_recipe(), 8, many)


def test_data_that_has_moved(run: Path, tmp_path: Path) -> None:
    figures = evaluate_run(run)
    shutil.move(run.parent / "data", tmp_path / "data")
    try:
        with pytest.raises(DataError, match=r"^Unknown data set '/.*/data'. Expected one of digits, a folder, "):
            evaluate_run(run)
        assert evaluate_run(run, root=str(tmp_path / "data")) == figures
    finally:
        shutil.move(tmp_path / "data", run.parent / "data")


def test_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^Split 'train' has the class '0', which the training data has not.$"):
        evaluate_run(run, split="train", root=str(Path(__file__).parents[2] / "zoo/data/embedded/digits.parquet"))
    shutil.copytree(run.parent / "data" / "test", tmp_path / "data")
    (tmp_path / "data" / "green").rename(tmp_path / "data" / "grey")
    with pytest.raises(
        DataError, match=r"the class 'grey', which the training data has not. Did you mean: green, red\?$"
    ):
        evaluate_run(run, split="train", root=str(tmp_path / "data"))


def test_a_class_may_be_missing(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels are matched by name: the figures are those of the classes that are there."""
    shutil.copytree(run.parent / "data" / "test", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "blue")
    figures = evaluate_run(run, split="train", root=str(tmp_path / "data"))
    assert figures["samples"] == 20
    assert caplog.messages == ["Split 'train' has no sample of 1 of 3 classes: blue"]
    whole = evaluate_run(run)
    assert isinstance(whole["loss"], float)
    shutil.rmtree(tmp_path / "data" / "green")
    shutil.rmtree(tmp_path / "data" / "red")
    shutil.copytree(run.parent / "data" / "test" / "blue", tmp_path / "data" / "blue")
    blue = evaluate_run(run, split="train", root=str(tmp_path / "data"))
    assert 30 * whole["loss"] == pytest.approx(20 * figures["loss"] + 10 * blue["loss"])


def test_no_such_split_names_the_nearest(run: Path) -> None:
    with pytest.raises(DataError, match=r"has no split 'tset'. Did you mean: test\? It has: test, train.$"):
        evaluate_run(run, split="tset")


def test_what_is_not_a_run_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is not a run folder: it has no config.json.$"):
        evaluate_run(tmp_path)
    with pytest.raises(WeightsError, match=r"is not a run folder: it has no config.json.$"):
        evaluate_run(tmp_path / "nowhere")
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no model.safetensors: the run has not finished its first epoch.$"):
        evaluate_run(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"name": "x"}')
    with pytest.raises(WeightsError, match=r"config.json is not a run folder's config: 'config' is missing or wrong.$"):
        evaluate_run(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"^Cannot read .*config.json: [^\n]+\.$"):
        evaluate_run(tmp_path / "copy")
