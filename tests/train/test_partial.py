"""What papers' recipes and fine-tuning ask of the loop: parts that are trained, losses, repeats, early ends."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.data.loader import EpochSampler
from zoo.errors import RecipeError
from zoo.train import engine
from zoo.train.automatic import finetune_recipe
from zoo.train.engine import _Run, train
from zoo.train.evaluate import evaluate_run
from zoo.train.partial import without_adapters
from zoo.train.recipe import Loss, resolve
from zoo.train.run_folder import RunFolder
from zoo.train.schedule import learning_rate
from zoo.train.tasks import ImageClassification, LabelsLoss


@pytest.fixture
def weights(tiny_recipe: Callable, tmp_path: Path) -> str:
    """Weights of the tiny model, to fine-tune."""
    from safetensors.torch import save_file

    recipe = tiny_recipe()
    torch.manual_seed(1)
    model = zoo.create_model(recipe.model.name, num_classes=3, **recipe.model.overrides)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    return str(tmp_path / "start.safetensors")


def test_a_linear_probe_changes_the_classifier_alone(
    tiny_recipe: Callable, weights: str, changed_in_an_epoch: Callable, tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"train.tune": "head", "model.checkpoint": weights})
    run = _Run(recipe, RunFolder(tmp_path / "run"), quiet=True)
    assert changed_in_an_epoch(run) == {"head.linear.weight", "head.linear.bias"}


def test_lora_trains_adapters_and_keeps_ordinary_weights(tiny_recipe: Callable, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = tiny_recipe(**{"train.tune": "lora", "model.checkpoint": weights, "lora.rank": 4, "train.ema": 0.5})
    run = _Run(recipe, RunFolder(tmp_path / "run"), quiet=True)
    run._train_epoch()
    trained = {name for name, tensor in run.plain_model.named_parameters() if tensor.requires_grad}
    assert all("lora_" in name or name.startswith("head.linear.") for name in trained)
    plain = zoo.build(run.config)
    plain.load_state_dict(without_adapters(run.plain_model).state_dict())  # strict: every name is there, and no other
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(inputs), run.plain_model.eval()(inputs), rtol=1e-4, atol=1e-5)
    result = train(recipe.replace(**{"schedule.epochs": 1}), tmp_path / "whole", quiet=True)
    assert zoo.create_model(f"local-dir:{result.folder}").num_classes == 3
    assert result.raw.keys() == result.metrics.keys()


def test_training_ends_early_when_it_gets_no_better(tiny_recipe: Callable, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"optim.lr": 1e-12, "schedule.warmup_lr": 0.0, "train.patience": 1, "schedule.epochs": 9})
    result = train(recipe, tmp_path / "run", quiet=True)
    assert len((result.folder / "metrics.csv").read_text().splitlines()) <= 4
    with pytest.raises(
        RecipeError, match=r"^recipe: train.patience waits for a better epoch, expected train.keep='best'"
    ):
        recipe.replace(**{"train.keep": "last"})


def test_passes_shrink_until_memory_has_them(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _Run._optimiser_step
    tried: list[weakref.ref] = []

    def limited(self: _Run, batches: object) -> torch.Tensor:
        if not any(run() is self for run in tried):
            assert [run() for run in tried] == [None] * len(tried)  # their memory is free again
            tried.append(weakref.ref(self))
        if self.micro_batch > 2:
            raise torch.OutOfMemoryError
        return step(self, batches)

    monkeypatch.setattr(engine._Run, "_optimiser_step", limited)
    recipe = tiny_recipe(**{"train.micro_batch": -1, "schedule.epochs": 1})
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.epoch == 1
    found = evaluate_run(result.folder)
    assert {key: found[key] for key in result.metrics} == pytest.approx(result.metrics)
    tried.clear()
    with pytest.raises(zoo.errors.TrainingError, match=r"^Out of memory at step 0"):
        train(recipe.replace(**{"train.micro_batch": 4}), tmp_path / "other", quiet=True)


def test_passes_shrink_to_sizes_that_the_task_takes(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(self: _Run, batches: object) -> None:
        tried.append(self.micro_batch)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine._Run, "_optimiser_step", fail)
    recipe = tiny_recipe(**{"train.micro_batch": -1, "train.batch_size": 12, "augment.mixup": 0.5})
    with pytest.raises(zoo.errors.TrainingError, match=r"^Out of memory at step 0. .* \(now 2\)"):
        train(recipe, tmp_path / "run", quiet=True)
    assert tried == [12, 6, 2]


def test_the_report_is_made_in_passes_that_memory_has(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    illustrate, tried = ImageClassification.illustrate, []

    def limited(self: ImageClassification, page: Any, model: Any, accelerator: Any, batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError
        illustrate(self, page, model, accelerator, batch_size)

    monkeypatch.setattr(ImageClassification, "illustrate", limited)
    recipe = tiny_recipe(**{"train.micro_batch": 4, "schedule.epochs": 1})
    with pytest.raises(zoo.errors.TrainingError, match=r"^Out of memory at step 6. To go on, lower train.micro_batch"):
        train(recipe, tmp_path / "fixed", quiet=True)
    train(recipe.replace(**{"train.micro_batch": -1}), tmp_path / "run", quiet=True)
    assert tried == [4, 8, 4, 2]
    assert (tmp_path / "run" / "report.html").is_file()


def test_repeats_come_one_after_the_other_and_cover_a_part() -> None:
    samplers = [EpochSampler(12, 2, shuffle=True, seed=3, rank=rank, world=2, repeats=3) for rank in range(2)]
    batches = [list(sampler) for sampler in samplers]
    keys = [key for pair in zip(*batches, strict=True) for each in zip(*pair, strict=True) for key in each]
    assert len(keys) == 12
    assert [repeat for _, _, repeat in keys] == [0, 1, 2] * 4
    positions = [position for _, position, _ in keys]
    assert positions == [position for position in positions[::3] for _ in range(3)]
    assert len(set(positions)) == 4


def test_binary_cross_entropy_is_timms_and_weights_multiply() -> None:
    from timm.loss import BinaryCrossEntropy

    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    own = LabelsLoss(Loss(name="bce"), 0.1)(logits, labels)
    torch.testing.assert_close(own.mean(), BinaryCrossEntropy(smoothing=0.1)(logits, labels))
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    plain, weighed = (LabelsLoss(Loss(), 0.0, each)(logits, labels) for each in (None, weights))
    torch.testing.assert_close(weighed, plain * weights[labels])
    shares = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(LabelsLoss(Loss(), 0.0, weights)(logits, shares), weighed)


def test_a_prefixed_warm_up_and_a_cool_down() -> None:
    values = {"epochs": 10, "warmup_epochs": 2, "warmup_prefix": True, "cooldown_epochs": 2, "min_lr": 0.1}
    schedule = resolve({"model": {"name": "a"}, "data": {"name": "b"}, "schedule": values}, "here").schedule
    assert learning_rate(schedule, 1.0, 2) == 1.0
    assert learning_rate(schedule, 1.0, 5) == pytest.approx(0.55)  # half of the six epochs between the two
    assert learning_rate(schedule, 1.0, 8) == learning_rate(schedule, 1.0, 9.9) == 0.1


def test_a_recipe_is_made_for_pictures_without_one(class_folder: Path, tmp_path: Path) -> None:
    model = "efficientvit_m0.zoo_cifar10"
    choice = finetune_recipe(model, str(class_folder), ["optim.lr=2e-3"])
    recipe = choice.recipe
    assert (recipe.model.name, recipe.data.name) == (model, str(class_folder))
    assert (recipe.data.holdout, recipe.data.val_split) == (0.2, "")
    assert (recipe.train.batch_size, recipe.schedule.epochs, recipe.optim.lr) == (8, 30, 2e-3)
    assert not recipe.loss.class_weights
    assert choice.notes[0] == "60 pictures of 3 classes to train on"

    for split in ("train", "val"):
        shutil.copytree(class_folder, tmp_path / "data" / split)
    for path in list((tmp_path / "data" / "train" / "red").iterdir())[:15]:
        path.unlink()
    recipe = finetune_recipe(model, str(tmp_path / "data")).recipe
    assert (recipe.data.val_split, recipe.data.test_split, recipe.loss.class_weights) == ("val", "", True)
    with pytest.raises(zoo.WeightsError, match=r"^lowformer_b2 has no pretrained weights"):
        finetune_recipe("lowformer_b2", str(class_folder))


@pytest.mark.parametrize("value", ["abc", "1.0", "0"])
def test_a_wrong_share_to_hold_out_is_one_clear_line(class_folder: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"data.holdout is '?{value}.*expected ") as caught:
        finetune_recipe("efficientvit_m0.zoo_cifar10", str(class_folder), [f"data.holdout={value}"])
    assert "\n" not in str(caught.value)


def test_a_split_is_found_under_any_of_its_names(class_folder: Path, tmp_path: Path) -> None:
    rows = [f"{class_folder}/red/{i:02d}.png,{i % 2},{'validation' if i < 4 else 'train'}\n" for i in range(20)]
    (tmp_path / "pictures.csv").write_text("path,label,split\n" + "".join(rows))
    choice = finetune_recipe("efficientvit_m0.zoo_cifar10", str(tmp_path / "pictures.csv"))
    assert choice.recipe.data.val_split == "validation"
    assert "the data's own split 'validation' to look at while training: 4 pictures" in choice.notes
