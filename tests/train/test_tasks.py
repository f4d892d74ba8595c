"""Tasks: text is learned like pictures, a teacher helps, samples are pruned, pictures grow."""

import csv
import hashlib
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.data.pruning import LossPruning, RandomPruning
from zoo.data.text import open_documents
from zoo.data.tokens import write_tokens
from zoo.errors import DataError, RecipeError, WeightsError
from zoo.inference import Classifier, load_run
from zoo.preprocessing import Preprocessing
from zoo.train.engine import _Run, train
from zoo.train.evaluate import evaluate_run
from zoo.train.recipe import Recipe, resolve
from zoo.train.run_folder import RunFolder
from zoo.train.schedule import img_size_at, learning_rate
from zoo.train.tasks import TASKS


@pytest.fixture(scope="module")
def text_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """48 rows a pass of 33 tokens, 6 steps in each of 3 epochs."""
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    lines = ["to be or not to be", "that is the question", "whether tis nobler in the mind to suffer"]
    path.write_text("".join(json.dumps({"text": lines[i % 3]}) + "\n" for i in range(70)))
    values = {
        "task": "language-modelling",
        "model": {"name": "plain_text"},
        "data": {"name": str(path), "seq_len": 32, "holdout": 0.2, "workers": 0},
        "optim": {"lr": 1e-2},
        "schedule": {"epochs": 3},
        "train": {"batch_size": 8, "tensorboard": False, "ema": 0.5},
    }
    return resolve(values, "text")


def rows_of(path: Path) -> list[dict[str, float]]:
    with (path / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_text_is_learned(text_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = text_recipe.replace(**{"schedule.epochs": 8})
    result = train(recipe, tmp_path / "run")
    rows = rows_of(result.folder)
    assert rows[-1]["val_loss"] < 0.8 * rows[0]["val_loss"]
    assert result.metrics["perplexity"] == pytest.approx(np.exp(result.metrics["loss"]))
    assert result.metrics["loss"] == min(row["ema_loss"] for row in rows)  # the lowest is the best
    assert "held-out loss " in capsys.readouterr().out
    figures = evaluate_run(result.folder)
    assert {key: figures[key] for key in result.metrics} == result.metrics
    with pytest.raises(WeightsError, match=r"holds plain_text, which reads text; expected a classifier"):
        load_run(result.folder)
    assert "What it writes after" in (result.folder / "report.html").read_text()
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["recipe_sha256"] == hashlib.sha256((result.folder / "recipe.toml").read_bytes()).hexdigest()


def test_packed_tokens_train_like_the_text_they_are_of(text_recipe: Recipe, tmp_path: Path, outcome: Callable) -> None:
    recipe = text_recipe.replace(**{"schedule.epochs": 1})
    write_tokens(open_documents(recipe.data.name), "bytes", tmp_path / "tokens", "train")
    left = train(recipe, tmp_path / "left", quiet=True)
    right = train(recipe.replace(**{"data.root": str(tmp_path / "tokens")}), tmp_path / "right", quiet=True)
    assert outcome(left.folder) == outcome(right.folder)


def test_text_killed_at_random_points_ends_the_same(
    text_recipe: Recipe, tmp_path: Path, outcome: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    recipe = text_recipe.replace(**{"train.save_steps": 2, "schedule.epochs": 8})
    whole = train(recipe, tmp_path / "whole", quiet=True)
    seed = time.time_ns()
    print("seed of the kills:", seed)  # shown when the test fails
    delays, step, left = random.Random(seed), _Run._optimiser_step, 0

    def die(self: _Run, batches: object) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return step(self, batches)

    monkeypatch.setattr(_Run, "_optimiser_step", die)
    kills = 0
    for _ in range(20):
        left = delays.randint(2, 4)  # a checkpoint comes every second step: each sitting gets somewhere
        with suppress(Killed):
            train(recipe, tmp_path / "run", resume=True, quiet=True)
            break
        kills += 1
    monkeypatch.undo()
    assert kills >= 10
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert outcome(tmp_path / "run") == outcome(whole.folder)


def test_text_that_does_not_fit(text_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for changes, kind, message in (
        (
            {"model.overrides.vocab_size": 200},
            RecipeError,
            r"^Tokenizer 'bytes' has 257 tokens, plain_text kno",
        ),
        ({"data.name": str(tmp_path / "empty.txt")}, DataError, r"empty.txt holds no text.$"),
        ({"data.seq_len": 10**6}, DataError, r"tokens are too few for one row of 1000000; lower data.seq_len.$"),
        ({"model.name": "efficientvit_m0"}, RecipeError, r"is no language model; set task='image-classification'.$"),
        ({"train.checkpoint_activations": True}, RecipeError, r"cannot checkpoint; set train.checkpoint_activations="),
    ):
        with pytest.raises(kind, match=message):
            train(text_recipe.replace(**changes), tmp_path / "run", quiet=True)


def test_a_text_model_does_not_classify(tiny_recipe: Callable, tmp_path: Path) -> None:
    changes = {"model.name": "plain_text", "model.overrides": {}}
    with pytest.raises(zoo.ConfigError, match=r"has no field 'num_classes'"):
        train(tiny_recipe(**changes), tmp_path / "run", quiet=True)


@pytest.fixture(scope="module")
def teacher(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows the three colours."""
    changes = {"model.overrides": {"img_size": 32}, "augment.scale": [0.8, 1.0], "optim.lr": 5e-3}
    recipe = tiny_recipe(**changes, **{"schedule.epochs": 8})
    result = train(recipe, tmp_path_factory.mktemp("teacher") / "run", quiet=True)
    assert result.metrics["top1"] > 60
    return result.folder


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_a_teacher_is_learned_from(tiny_recipe: Callable, teacher: Path, tmp_path: Path, kind: str) -> None:
    distill = {"teacher": str(teacher), "kind": kind, "alpha": 1.0, "temperature": 2.0}
    recipe = tiny_recipe(**{f"distill.{key}": value for key, value in distill.items()}, **{"optim.lr": 5e-3})
    run = _Run(recipe, RunFolder(tmp_path / "run"), quiet=True)
    run.train_loader.set_epoch(0)
    batch = run.task.scoring.prepare(next(iter(run.train_loader)), torch.device("cpu"))
    losses = run.task.losses(run.model, batch)
    assert losses.shape == (8,)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in run.model.parameters())
    assert all(parameter.grad is None for parameter in run.task.teacher.model.parameters())
    if kind != "feature":  # with alpha 1 the labels do not matter
        batch.targets[:] = (batch.targets + 1) % 3
        run.model.eval()
        expected = run.task.losses(run.model, batch)
        batch.targets[:] = (batch.targets + 1) % 3
        assert torch.equal(run.task.losses(run.model, batch), expected)
        # a student that is its teacher has nothing to learn from its probabilities
        own = run.task.losses(run.task.teacher.model, batch)
        assert own.max() < 1e-5 if kind == "soft" else own.max() < losses.max()
    result = train(recipe.replace(**{"schedule.epochs": 1}), tmp_path / "trained", quiet=True)
    assert 0 < rows_of(result.folder)[0]["train_loss"] < 5


@pytest.mark.parametrize("student", ["efficientformer_l1", "efficientvit_m0"])
def test_features_are_those_before_either_of_two_classifiers(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    small = {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "img_size": 32}
    own = small if student == "efficientformer_l1" else tiny_recipe().model.overrides
    model: Any = zoo.create_model("efficientformer_l1", num_classes=3, **small)
    monkeypatch.setattr("zoo.train.distill.load_teacher", lambda name: Classifier(model, Preprocessing(), ("a",) * 3))
    changes = {"model.name": student, "model.overrides": own, "distill.teacher": "it", "distill.kind": "feature"}
    run = _Run(tiny_recipe(**changes), RunFolder(tmp_path / "run"), quiet=True)
    run.train_loader.set_epoch(0)
    batch = run.task.scoring.prepare(next(iter(run.train_loader)), torch.device("cpu"))
    assert run.task.losses(run.model, batch).shape == (8,)


def test_a_teacher_of_other_classes_is_refused(tiny_recipe: Callable, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"distill.teacher": "efficientvit_m0.zoo_cifar10"})
    with pytest.raises(RecipeError, match=r"knows 10 classes, the data has 3; expected a teacher of the same classes"):
        train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(WeightsError, match=r"^No run folder 'no/such'"):
        train(recipe.replace(**{"distill.teacher": "no/such"}), tmp_path / "run", quiet=True)
    train(recipe.replace(**{"distill.kind": "feature", "schedule.epochs": 1}), tmp_path / "run", quiet=True)


def test_random_pruning_keeps_another_part_in_every_epoch() -> None:
    pruning = RandomPruning(100, fraction=0.3, epochs=10, seed=4)
    first, second = pruning.select(0), pruning.select(1)
    assert len(first) == len(second) == 70
    assert first.tolist() == pruning.select(0).tolist() != second.tolist()
    assert (pruning.weights == 1).all()


def test_loss_pruning_keeps_the_expected_gradient() -> None:
    from accelerate import Accelerator

    pruning = LossPruning(1000, fraction=0.4, epochs=100, seed=1)
    assert len(pruning.select(0)) == 1000
    losses = torch.linspace(0, 2, 1000)
    losses[990:] = float("nan")  # never seen
    pruning.update(torch.arange(990), losses[:990])
    assert len(pruning.select(0)) == 1000  # nothing changes within an epoch
    pruning.end_epoch(Accelerator(cpu=True))
    mean = losses[:990].mean().item()
    sums = []
    for epoch in range(1, 80):
        kept = pruning.select(epoch)
        high = np.flatnonzero(~(pruning.losses < mean))
        assert set(high) <= set(kept)
        assert (pruning.weights[high] == 1).all()
        sums.append(pruning.weights[kept].sum())
    assert len(high) < len(kept) < 1000
    assert np.mean(sums) == pytest.approx(1000, rel=0.02)
    assert len(pruning.select(88)) == 1000
    assert (pruning.weights == 1).all()


@pytest.mark.parametrize("kind", ["images", "text"])
def test_samples_travel_to_workers_that_are_spawned(tiny_recipe: Callable, tmp_path: Path, kind: str) -> None:
    """As on macOS and Windows, where processes are not forked."""
    (tmp_path / "text.txt").write_text("Some words, again and again. " * 40)
    text = {"task": "language-modelling", "model.name": "matmulfree_2m", "model.overrides": {"num_hidden_layers": 1}}
    changes = {"data.name": str(tmp_path / "text.txt"), "data.seq_len": 32} | text
    recipe = tiny_recipe(**(changes if kind == "text" else {"augment.auto_augment": "rand-m9-mstd0.5-inc1"}))
    samples = TASKS[recipe.task](recipe).train_samples
    [again] = ForkingPickler.loads(ForkingPickler.dumps([samples]))
    keys = [(0, 1, 0), (0, 2, 0)]
    assert torch.equal(again.batch(keys).inputs, samples.batch(keys).inputs)


def test_pruning_that_leaves_no_batch_is_refused(tiny_recipe: Callable, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^data.pruning leaves 5 samples of epoch 1, fewer than train.batch_size 8"):
        train(tiny_recipe(**{"data.pruning": "random", "data.prune_fraction": 0.9}), tmp_path, quiet=True)


@pytest.mark.parametrize("kind", ["random", "loss"])
def test_a_pruned_run_makes_fewer_steps_and_resumes(
    tiny_recipe: Callable, tmp_path: Path, outcome: Callable, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Killed(BaseException):
        pass

    changes = {"data.pruning": kind, "data.prune_fraction": 0.7, "train.batch_size": 4, "schedule.epochs": 4}
    recipe = tiny_recipe(**changes, **{"train.save_steps": 1})
    whole = train(recipe, tmp_path / "whole", quiet=True)
    rows = rows_of(whole.folder)
    steps = np.diff([0, *(row["step"] for row in rows)])
    assert steps[0] == (12 if kind == "loss" else 3)
    assert steps[1] < 12
    # The schedule is one of epochs, whatever their length.
    assert rows[-1]["learning_rate"] < 0.1 * rows[0]["learning_rate"]
    step = _Run._optimiser_step

    def die(self: _Run, batches: object) -> Tensor:
        if self.epoch == 1 and self.epoch_step == 2:
            raise Killed
        return step(self, batches)

    monkeypatch.setattr(_Run, "_optimiser_step", die)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert outcome(tmp_path / "run") == outcome(whole.folder)


def schedule(**changes: object) -> object:
    recipe = resolve({"model": {"name": "a"}, "data": {"name": "b"}, "schedule": {"epochs": 10, **changes}}, "here")
    return recipe.schedule


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_cosine_is_timms(warmup: int) -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    timms = CosineLRScheduler(
        optimizer, t_initial=70, lr_min=1e-3, warmup_t=7 * warmup, warmup_lr_init=1e-4, t_in_epochs=False
    )
    ours = schedule(warmup_epochs=warmup, warmup_lr=1e-4, min_lr=1e-3)
    for step in range(70):
        timms.step_update(step)
        assert learning_rate(ours, 0.3, step / 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"name": "constant"}, [0.5, 1, 1, 1, 1]),
        ({"name": "linear", "min_lr": 0.2}, [0.5, 1, 0.7, 0.4, 0.2]),
        ({"name": "wsd", "decay_epochs": 4, "min_lr": 0.0}, [0.5, 1, 1, 0.625, 0]),
        ({"name": "step", "decay_epochs": 3, "decay_rate": 0.5, "min_lr": 0.2}, [0.5, 1, 0.5, 0.25, 0.2]),
    ],
)
def test_schedules(changes: dict, expected: list[float]) -> None:
    own = schedule(warmup_epochs=2, warmup_lr=0.0, **changes)
    found = [learning_rate(own, 1.0, epoch) for epoch in (1, 2, 5, 7.5, 10)]
    if changes["name"] == "linear":
        expected[3] = 1 - 0.8 * 5.5 / 8
    assert found == pytest.approx(expected)


def test_pictures_may_grow_while_training(tiny_recipe: Callable, tmp_path: Path) -> None:
    growing = schedule(start_size=96, grow_epochs=4)
    assert [img_size_at(growing, (224, 160), epoch)[0] for epoch in range(6)] == [96, 128, 160, 192, 224, 224]
    assert img_size_at(schedule(), (224, 160), 0) == (224, 160)
    recipe = tiny_recipe(**{"model.overrides.img_size": 64, "schedule.start_size": 32, "schedule.grow_epochs": 1})
    run = _Run(recipe, RunFolder(tmp_path / "run"), quiet=True)
    for epoch, side in ((0, 32), (1, 64)):
        run.train_loader.set_epoch(epoch)
        assert next(iter(run.train_loader)).inputs.shape == (8, 3, side, side)


@pytest.mark.parametrize("rule, rate", [("linear", 1e-3 / 8), ("sqrt", 1e-3 / 8**0.5)])
def test_the_rate_follows_the_batch_by_the_recipes_rule(
    tiny_recipe: Callable, tmp_path: Path, rule: str, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optim.lr": 1e-3, "optim.lr_batch": 64, "optim.lr_rule": rule, "schedule.epochs": 1}
    train(tiny_recipe(**changes, **{"train.micro_batch": 4}), tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        f"batch of 8 = 1 processes x 4 samples x 2 passes; learning rate {rate:.4g} for it, by the {rule} rule from "
        "0.001 at 64"
    )


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text("version = 2\nwhatever = 3\n")
    with pytest.raises(
        RecipeError, match=r"new.toml has the format 2, this zoo reads up to 1; upgrade efficient-zoo.$"
    ):
        zoo.load_recipe(tmp_path / "new.toml")


def test_classes_without_a_picture_are_warned_of(
    tiny_recipe: Callable, class_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [f"{class_folder}/red/{i:02d}.png,0\n" for i in range(8)]
    pictures += [f"{class_folder}/blue/00.png,4\n"]  # the only one of its class, which is kept for training
    (tmp_path / "pictures.csv").write_text("path,label\n" + "".join(pictures))
    TASKS["image-classification"](tiny_recipe(**{"data.name": str(tmp_path / "pictures.csv")}))
    assert caplog.messages == [
        "The part that is held out has no sample of 4 of 5 classes: 1, 2, 3, 4",
        "Split 'train' has no sample of 3 of 5 classes: 1, 2, 3",
    ]


def test_one_class_alone_is_nothing_to_learn(tiny_recipe: Callable, class_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures.csv").write_text(
        f"path,label\n{class_folder}/red/00.png,red\n{class_folder}/red/01.png,red\n"
    )
    with pytest.raises(DataError, match=r"pictures.csv has one class, 'red'; expected two or more to tell apart\.$"):
        TASKS["image-classification"](tiny_recipe(**{"data.name": str(tmp_path / "pictures.csv")}))
