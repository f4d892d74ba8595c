"""The training loop: what it learns, writes, refuses and survives."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn

import zoo
from zoo.errors import ConfigError, DataError, MissingExtraError, Preempted, RecipeError, TrainingError
from zoo.inference import load_run
from zoo.train import device, engine
from zoo.train.checkpoint import load_checkpoint
from zoo.train.engine import Result, _make_optimizer, _passes, _Run, train
from zoo.train.evaluate import evaluate_run
from zoo.train.finetune import finetune
from zoo.train.recipe import Optim, Train
from zoo.train.run_folder import RunFolder
from zoo.train.sharding import check


def read_metrics(path: Path) -> list[dict[str, float]]:
    with (path / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that has learned something, with everything on."""
    recipe = tiny_recipe(
        **{
            "augment.scale": [0.8, 1.0],
            "optim.lr": 1e-2,
            "schedule.epochs": 12,
            "schedule.warmup_epochs": 1,
            "train.ema": 0.8,
            "train.tensorboard": True,
        }
    )
    return train(recipe, tmp_path_factory.mktemp("finished") / "run", quiet=True)


def test_the_loss_falls_and_the_classes_are_learned(finished: Result) -> None:
    rows = read_metrics(finished.folder)
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert finished.metrics["top1"] > 90


def test_the_run_folder_is_complete(finished: Result) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "config.json",
        "recipe.toml",
        "environment.json",
        "manifest.json",
        "model.safetensors",
        "checkpoint.safetensors",
        "metrics.csv",
        "curves.png",
        "report.html",
        "result.json",
        "sample.png",
        "tensorboard",
    }
    assert list((finished.folder / "tensorboard").glob("**/events.out.tfevents.*"))
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert load_run(finished.folder).predict([finished.folder / "sample.png"])[0][0][0] in ("blue", "green", "red")


def test_the_report_shows_what_was_kept_and_what_it_cost(finished: Result) -> None:
    page = (finished.folder / "report.html").read_text()
    assert f"averaged weights of epoch {finished.epoch}: top-1 {finished.metrics['top1']:.2f} %" in page
    assert "last epoch, raw weights" in page
    assert f"{12 * 6 * 8:,} in {12 * 6:,} steps; " in page
    assert page.count('src="data:image/png;base64,') >= 2
    assert "Confusion matrix" in page
    assert re.search(r"peak memory</td><td>[\d,]+ MB", page)


def test_the_best_epoch_is_kept_and_is_what_the_result_says(finished: Result) -> None:
    rows = read_metrics(finished.folder)
    best = max(row["ema_top1"] for row in rows)
    assert finished.epoch == next(row["epoch"] for row in rows if row["ema_top1"] == best)
    assert finished.metrics == {key: rows[finished.epoch - 1][f"ema_{key}"] for key in ("loss", "top1", "top5")}


def test_the_schedule_warms_up_and_then_falls(finished: Result) -> None:
    rates = [row["learning_rate"] for row in read_metrics(finished.folder)]
    assert max(rates) <= 1e-2
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.01 * 1e-2


def test_no_worker_outlives_its_run(tiny_recipe: Callable, tmp_path: Path) -> None:
    train(tiny_recipe(**{"data.workers": 1, "schedule.epochs": 1}), tmp_path / "run", quiet=True)
    assert multiprocessing.active_children() == []


def test_last_keeps_the_last_epoch(tiny_recipe: Callable, tmp_path: Path) -> None:
    result = train(tiny_recipe(**{"train.keep": "last", "schedule.epochs": 3}), tmp_path / "run", quiet=True)
    assert result.epoch == 3
    assert result.metrics["loss"] == read_metrics(result.folder)[-1]["val_loss"]


def test_a_finished_run_resumes_to_its_result(finished: Result) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    held = zoo.load_recipe(finished.folder / "recipe.toml")
    assert train(held, finished.folder, resume=True, quiet=True) == finished
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_a_run_folder_in_use_is_not_overwritten(finished: Result, tiny_recipe: Callable, tmp_path: Path) -> None:
    held = zoo.load_recipe(finished.folder / "recipe.toml")
    with pytest.raises(
        RecipeError, match=r"holds a run already; pass --resume auto to continue it, or another --out.$"
    ):
        train(held, finished.folder, quiet=True)
    other = held.replace(**{"optim.lr": 0.5, "model.overrides.drop_rate": 0.1})
    with pytest.raises(RecipeError) as caught:
        train(other, finished.folder, resume=True, quiet=True)
    assert str(caught.value) == (
        f"{finished.folder} holds a run of another recipe: model.overrides.drop_rate was None, is 0.1; "
        "optim.lr was 0.01, is 0.5. Choose another --out."
    )
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecipeError, match=r"holds no run, but is not empty \(thesis.tex\); choose another --out.$"):
        train(held, tmp_path, quiet=True)
    with pytest.raises(RecipeError, match=r"^Cannot make the run folder .*thesis.tex: File exists.$"):
        train(held, tmp_path / "thesis.tex", quiet=True)


def test_a_run_that_died_before_its_recipe_was_written_starts_anew(tiny_recipe: Callable, tmp_path: Path) -> None:
    for name in ("config.json", "environment.json", ".sample.png.1-abc.tmp"):
        (tmp_path / name).write_text("half")
    train(tiny_recipe(**{"schedule.epochs": 1}), tmp_path, quiet=True)
    assert not list(tmp_path.glob("*.tmp"))
    assert load_run(tmp_path).labels == ("blue", "green", "red")


def test_accumulation_equals_the_larger_batch(tiny_recipe: Callable, tmp_path: Path) -> None:
    plain = {"model.name": "plain_images", "model.overrides": {"img_size": 32}, "optim.name": "sgd"}
    plain["train.batch_size"] = 16
    whole = train(tiny_recipe(**plain), tmp_path / "whole", quiet=True)
    split = train(tiny_recipe(**plain, **{"train.micro_batch": 11}), tmp_path / "split", quiet=True)  # 2 of 8
    left, right = (load_run(result.folder).model.state_dict() for result in (whole, split))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)
    steps = [[row["step"] for row in read_metrics(result.folder)] for result in (whole, split)]
    assert steps == [[3, 6], [3, 6]]
    start = zoo.create_model("plain_images", num_classes=3).state_dict()
    assert not any(torch.allclose(left[name], start[name]) for name in left)


@pytest.mark.parametrize("mode, limit", [("norm", 1e-3), ("value", 1e-5)])
def test_clipping_bounds_the_step(tiny_recipe: Callable, tmp_path: Path, mode: str, limit: float) -> None:
    changes = {"optim.clip": limit, "optim.clip_mode": mode, "optim.name": "momentum", "optim.lr": 1.0}
    recipe = tiny_recipe(**changes, **{"optim.weight_decay": 0.0, "optim.momentum": 0.0, "schedule.epochs": 1})
    run = _Run(recipe, RunFolder(tmp_path), quiet=True)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in run.model.parameters()])
    run.train_loader.set_epoch(0)
    run._set_learning_rate()
    run._optimiser_step(iter(run.train_loader))
    moved = torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]) - before
    size = moved.norm() if mode == "norm" else moved.abs().max()
    assert 0.9 * limit < size < 1.01 * limit


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.clip": 0.01, "optim.clip_mode": "agc"},
        {"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.smoothing": 0.1},
        {"augment.auto_augment": "rand-m5-n1", "augment.erasing": 0.3, "augment.color_jitter": 0.2},
        {"optim.layer_decay": 0.7},
        # 64 px: torch 2.15's bf16 gradient of a strided convolution over a 1 x 1 map is uninitialised memory
        {"train.precision": "bf16", "model.overrides.img_size": 64},
        {"optim.name": "lamb"},
        {"model.overrides.in_chans": 1},
        {"train.channels_last": False, "data.interpolation": "nearest", "data.crop_pct": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_trains(tiny_recipe: Callable, tmp_path: Path, changes: dict) -> None:
    result = train(tiny_recipe(**changes, **{"schedule.epochs": 1}), tmp_path / "run", quiet=True)
    [row] = read_metrics(result.folder)
    assert 0 < row["train_loss"] < 3


def test_layer_decay_slows_the_early_layers(tiny_recipe: Callable, tmp_path: Path) -> None:
    run = _Run(tiny_recipe(**{"optim.layer_decay": 0.5}), RunFolder(tmp_path), quiet=True)
    assert run._set_learning_rate() == pytest.approx(2e-3)
    rates = {
        name: group["lr"]
        for group in run.optimizer.param_groups
        for name, parameter in run.model.named_parameters()
        if any(parameter is own for own in group["params"])
    }
    stem = next(rate for name, rate in rates.items() if name.startswith("patch_embed"))
    assert stem < 0.3 * next(rate for name, rate in rates.items() if name.startswith("head"))


def test_auxiliary_routers_learn_ten_times_as_fast() -> None:
    model = zoo.create_model("mor_2m_r3", hidden_size=48, num_hidden_layers=5, intermediate_size=64, aux_router=True)
    optimizer = _make_optimizer(model, Optim(betas=(0.9, 0.95)), 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == (0.9, 0.95)
        own = {id(each) for each in model.model.aux_routers.parameters()}
        assert {id(each) in own for each in group["params"]} == {group.get("lr_scale", 1.0) == 10.0}


def test_runs_of_one_process_may_differ_in_precision_and_accumulation(tiny_recipe: Callable, tmp_path: Path) -> None:
    for i, (precision, micro_batch) in enumerate([("fp32", 0), ("bf16", 4), ("fp32", 8)]):
        changes = {"train.precision": precision, "train.micro_batch": micro_batch, "schedule.epochs": 1}
        changes["model.overrides.img_size"] = 64  # see above
        result = train(tiny_recipe(**changes), tmp_path / str(i), quiet=True)
        assert read_metrics(result.folder)[0]["step"] == 6
    assert read_metrics(tmp_path / "0") == read_metrics(tmp_path / "2")
    assert device.make_accelerator("bf16").mixed_precision == "bf16"
    assert device.make_accelerator("fp32").mixed_precision == "no"


def test_equal_seeds_give_equal_runs_and_others_do_not(
    tiny_recipe: Callable, tmp_path: Path, outcome: Callable
) -> None:
    changes = {"model.overrides.drop_path_rate": 0.2, "augment.mixup": 0.5, "schedule.epochs": 1}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        train(tiny_recipe(**changes, seed=seed), tmp_path / name, quiet=True)
        torch.rand(7)  # what a program does between runs must not matter
    assert outcome(tmp_path / "first") == outcome(tmp_path / "again")
    assert read_metrics(tmp_path / "first") != read_metrics(tmp_path / "other")


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"model.name": "efficientvit_n0"}, zoo.UnknownModelError, r"^Unknown model 'efficientvit_n0'. Did you mean: "),
        ({"model.overrides.depth": [1]}, ConfigError, r"has no field 'depth'. Did you mean: depths"),
        ({"model.overrides.checkpoint": "x"}, ConfigError, r"has no field 'checkpoint'"),
        ({"model.overrides.num_classes": 2}, DataError, r"has 3 classes, but model.overrides.num_classes is 2; "),
        ({"model.overrides.num_classes": 9}, DataError, r"has 3 classes, but model.overrides.num_classes is 9; "),
        ({"model.checkpoint": "no.safetensors"}, zoo.WeightsError, r"^no.safetensors: no such file"),
        ({"optim.name": "adamq"}, RecipeError, r"^optim.name is 'adamq', which timm does not know. Did you mean: adam"),
        ({"optim.name": "fusedadamw"}, RecipeError, r"^optim.name is 'fusedadamw', which does not work here: "),
        ({"augment.auto_augment": "rnd"}, RecipeError, r"^augment.auto_augment is 'rnd'; expected timm's notation"),
        (
            {"train.batch_size": 7, "augment.mixup": 0.5},
            RecipeError,
            r"^A forward pass has 7 samples; mixup and cutmix need ",
        ),
        ({"train.batch_size": 99}, RecipeError, r"^train.batch_size 99 is more than the 48 training samples; "),
    ],
)
def test_a_recipe_that_cannot_run_is_one_clear_line(
    tiny_recipe: Callable, tmp_path: Path, changes: dict, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(tiny_recipe(**changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)


def test_a_precision_that_the_device_has_not_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("bf16 mixed precision requires a supported device.")

    monkeypatch.setattr(device, "Accelerator", refuse)
    with pytest.raises(RecipeError, match=r"^train.precision is 'bf16', which does not work here: bf16 mixed "):
        device.make_accelerator("bf16")


@pytest.mark.parametrize(
    "kind, message",
    [
        (DistributedType.FSDP, r"^accelerate is set to FSDP 1; expected fsdp_version: 2 "),
        (DistributedType.MEGATRON_LM, r"^accelerate is set to MEGATRON_LM; .* expected DDP, FSDP2 or DeepSpeed "),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: DistributedType, message: str
) -> None:
    class Sharded:
        distributed_type = kind
        is_fsdp2 = False

    monkeypatch.setattr(device, "Accelerator", lambda **_: Sharded())
    with pytest.raises(RecipeError, match=message):
        device.make_accelerator("fp32")


@pytest.mark.parametrize(
    "processes, config, message",
    [
        (1, {"stage": 0}, r"has zero_optimization.stage 0, expected 1, 2 or 3.$"),
        (1, {"stage": 3, "offload_param": {"device": "nvme"}}, r"has offloading to nvme, expected cpu.$"),
        (1, {"stage": 2, "offload_optimizer": None}, r"has an optimizer, which is the recipe's.$"),
        (2, {"stage": 2}, r"^accelerate is set to DEEPSPEED, which accelerate does on GPUs and their like alone; "),
    ],
)
def test_settings_of_deepspeed_that_are_of_no_use_are_refused(processes: int, config: dict, message: str) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": config, "optimizer": {}})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=processes,
        device=torch.device("cpu"),
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    with pytest.raises(RecipeError, match=message):
        check(cast(Accelerator, accelerator))


def test_deepspeed_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    message = """train.sharding='zero2' needs deepspeed: pip install "efficient-zoo[deepspeed]\""""
    with pytest.raises(MissingExtraError, match=f"^{re.escape(message)}$"):
        device.make_accelerator("fp32", sharding="zero2")


def test_one_process_shares_with_nobody(caplog: pytest.LogCaptureFixture) -> None:
    device.make_accelerator("fp32", sharding="fsdp2")
    assert caplog.messages == ["train.sharding has no effect with one process"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate takes the GPU")
def test_cpus_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "")  # which accelerate sets, put back afterwards
    monkeypatch.setattr(device, "Accelerator", lambda fsdp_plugin, **options: Accelerator(**options))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"^train.sharding is 'fsdp2', which .* expected '' on 'cpu'.$"):
        device.make_accelerator("fp32", sharding="fsdp2")


@pytest.mark.parametrize(
    "package, what, extra",
    [
        ("matplotlib", "Plotting the curves", "train"),
        ("tensorboard", "train.tensorboard", "train"),
        ("wandb", "train.wandb", "wandb"),
    ],
)
def test_a_missing_package_shows_before_the_work_begins(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, what: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'^{what} needs {package}: pip install "efficient-zoo\[{extra}\]"$'):
        train(tiny_recipe(**{"train.tensorboard": True, "train.wandb": "test"}), tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(tiny_recipe: Callable, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"optim.lr": 1e10, "optim.name": "sgd", "schedule.warmup_lr": 1e10})
    with pytest.raises(TrainingError) as caught:
        train(recipe, tmp_path, quiet=True)
    assert re.fullmatch(
        r"The loss is (nan|inf) at step \d \(epoch 1\), learning rate \d.*e\+(09|10); no checkpoint had been written "
        "yet. To go on, lower optim.lr or set optim.clip, in another --out.",
        str(caught.value),
    )


def test_the_last_good_checkpoint_is_kept(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(engine.TASKS["image-classification"]):
        def losses(self, model: nn.Module, batch: object, *seed: int) -> torch.Tensor:
            return super().losses(model, batch, *seed) * (float("nan") if seed[1] == 8 else 1)

    monkeypatch.setitem(engine.TASKS, "image-classification", Poisoned)
    recipe = tiny_recipe(**{"train.save_steps": 1})
    with pytest.raises(TrainingError) as caught:
        train(recipe, tmp_path, quiet=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert str(caught.value).startswith("The loss is nan at step 8 (epoch 2), learning rate 0.00")
    assert f"; the last good checkpoint is {checkpoint}. " in str(caught.value)
    run = _Run(recipe, RunFolder(tmp_path), quiet=True)
    assert load_checkpoint(checkpoint, run.plain_model, None, run._plain_optimizer)[0]["step"] == 8
    assert all(tensor.isfinite().all() for tensor in run.plain_model.state_dict().values())
    monkeypatch.undo()  # and it goes on from there
    assert train(recipe, tmp_path, resume=True, quiet=True).epoch in (1, 2)


@pytest.mark.parametrize("save_steps", [0, 1])
def test_spoiled_weights_are_not_saved_though_the_loss_is_finite(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    step = _Run._optimiser_step

    def spoil(self: _Run, batches: object) -> torch.Tensor:
        loss = step(self, batches)
        if self.step == 5:  # the last of the first epoch
            next(self.model.parameters()).data.fill_(float("inf"))
        return loss

    monkeypatch.setattr(_Run, "_optimiser_step", spoil)
    with pytest.raises(TrainingError, match=r"^The weights are no longer finite at step 5 \(epoch 1\), learning rate "):
        train(tiny_recipe(**{"train.save_steps": save_steps}), tmp_path, quiet=True)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoint.safetensors").exists() == bool(save_steps)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_stops_the_run_with_its_name(
    tiny_recipe: Callable, class_folder: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(class_folder, tmp_path / "data")
    for picture in (tmp_path / "data" / "red").iterdir():
        picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(DataError, match=r"^/.*/red/\d\d.png is a damaged picture: [^\n]*\.$"):
        train(
            tiny_recipe(**{"data.name": str(tmp_path / "data"), "data.workers": workers}), tmp_path / "run", quiet=True
        )


def test_a_worker_that_is_killed_between_batches_is_one_clear_line(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's handler of the signal raises wherever the process is, here in a step, not where a batch is waited for."""
    step = _Run._optimiser_step

    def interrupted(self: _Run, batches: Any) -> Any:
        if self.step == 7:
            os.kill(self.train_loader._loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
            time.sleep(60)  # until the signal comes
        return step(self, batches)

    monkeypatch.setattr(_Run, "_optimiser_step", interrupted)
    with pytest.raises(TrainingError, match=r"^A data worker died: .*--resume auto\.$"):
        train(tiny_recipe(**{"data.workers": 1}), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    assert train(tiny_recipe(**{"data.workers": 1}), tmp_path / "run", resume=True, quiet=True).metrics


def test_some_damaged_pictures_may_be_skipped(
    tiny_recipe: Callable, class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(class_folder, tmp_path / "data")
    for name in ("red/03.png", "blue/10.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    changes = {"data.name": str(tmp_path / "data"), "data.max_corrupt": 2, "data.workers": 1}
    result = train(tiny_recipe(**changes), tmp_path / "run")
    assert read_metrics(result.folder)[-1]["step"] == 12
    assert capsys.readouterr().out.splitlines()[-1] == "2 samples could not be read; report.html lists them"
    page = (result.folder / "report.html").read_text()
    assert "2 samples could not be read" in page
    assert str(tmp_path / "data" / "red" / "03.png") in page


def test_the_sample_picture_is_one_that_can_be_read(tiny_recipe: Callable, class_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(class_folder, data / split)
    (data / "val" / "blue" / "00.png").write_bytes(b"")
    changes = {"data.name": str(data), "data.val_split": "val", "schedule.epochs": 1}
    with pytest.raises(DataError, match=r"00.png is empty; expected a picture.$"):
        train(tiny_recipe(**changes), tmp_path / "run", quiet=True)
    result = train(tiny_recipe(**changes, **{"data.max_corrupt": 1}), tmp_path / "run", quiet=True)
    expected = Image.open(data / "val" / "blue" / "01.png").tobytes()
    assert Image.open(result.folder / "sample.png").tobytes() == expected


def test_a_split_of_its_own_for_validation(tiny_recipe: Callable, class_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(class_folder, tmp_path / "data" / "train")
    shutil.copytree(class_folder / "red", tmp_path / "data" / "val" / "red")
    recipe = tiny_recipe(**{"data.name": str(tmp_path / "data"), "data.val_split": "val", "schedule.epochs": 1})
    result = train(recipe, tmp_path / "run", quiet=True)
    assert read_metrics(result.folder)[0]["step"] == 7  # nothing was held out of the 60
    assert evaluate_run(result.folder) == {"split": "heldout", "samples": 20, **result.metrics}


def test_finetuning_is_compared_with_the_same_from_scratch(
    finished: Result, tiny_recipe: Callable, tmp_path: Path
) -> None:
    changes = {"model.checkpoint": str(finished.folder / "model.safetensors"), "train.from_scratch": True}
    recipe = tiny_recipe(**changes, **{"optim.lr": 1e-4, "schedule.epochs": 1})
    comparison = finetune(recipe, tmp_path / "run", quiet=True)
    assert comparison.from_scratch is not None
    assert comparison.from_scratch.folder == tmp_path / "run" / "from_scratch"
    assert comparison.result.metrics["top1"] > comparison.from_scratch.metrics["top1"]
    scratch = zoo.load_recipe(comparison.from_scratch.folder / "recipe.toml")
    assert scratch == recipe.replace(**{"model.checkpoint": "", "train.from_scratch": False})
    assert finetune(recipe, tmp_path / "run", resume=True, quiet=True) == comparison


def test_epochs_are_told_where_there_is_no_terminal(
    tiny_recipe: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipe(**{"train.ema": 0.9}), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "held-out top-1 " in lines[0]
    assert "averaged weights " in lines[0]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    "batch_size, limit, world, expected",
    [
        (8, 0, 1, (8, 1)),
        (8, 8, 1, (8, 1)),
        (8, 3, 1, (2, 4)),
        (8, 99, 2, (4, 1)),
        (12, 4, 2, (3, 2)),
        (7, 2, 1, (1, 7)),
    ],
)
def test_the_batch_is_reached_by_accumulation(
    batch_size: int, limit: int, world: int, expected: tuple[int, int]
) -> None:
    assert _passes(Train(batch_size=batch_size, micro_batch=limit), world) == expected
    micro_batch, passes = expected
    assert micro_batch * passes * world == batch_size


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"is 9, which 2 processes cannot share equally; the nearest .* is 8.$"):
        _passes(Train(batch_size=9), 2)


def test_sigterm_saves_and_a_resumed_run_is_the_same(
    tiny_recipe: Callable, tmp_path: Path, outcome: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, before = _Run._optimiser_step, signal.getsignal(signal.SIGTERM)

    def terminate(self: _Run, batches: object) -> torch.Tensor:
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    whole = train(tiny_recipe(), tmp_path / "whole", quiet=True)
    monkeypatch.setattr(_Run, "_optimiser_step", terminate)
    with pytest.raises(
        Preempted, match=r"^Stopped by SIGTERM after step 9; .*safetensors is saved, --resume auto goes on "
    ):
        train(tiny_recipe(), tmp_path / "run", quiet=True)
    assert Preempted.exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    train(tiny_recipe(), tmp_path / "run", resume=True, quiet=True)
    assert outcome(tmp_path / "run") == outcome(whole.folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_says_what_to_lower(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: _Run, batches: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(_Run, "_optimiser_step", fail)
    with pytest.raises(TrainingError) as caught:
        train(tiny_recipe(), tmp_path / "run", quiet=True)
    assert str(caught.value) == (
        "Out of memory at step 0. To go on, lower train.micro_batch (now 8), which leaves the batch of a step as it is"
        ", or use train.precision='bf16', or set train.checkpoint_activations=true."
    )


def test_checkpointed_activations_change_no_gradient(tiny_recipe: Callable, tmp_path: Path) -> None:
    runs = [
        train(tiny_recipe(**{"train.checkpoint_activations": each}), tmp_path / str(each), quiet=True).folder
        for each in (False, True)
    ]
    left, right = (read_metrics(run) for run in runs)
    # Not so the figures of evaluation: the second forward pass moves batch norm's running statistics once more.
    assert [row["train_loss"] for row in left] == pytest.approx([row["train_loss"] for row in right], rel=1e-5)


@pytest.mark.slow
def test_compiled_training_is_the_same_but_for_rounding(tiny_recipe: Callable, tmp_path: Path) -> None:
    changes = {"model.name": "plain_images", "model.overrides": {"img_size": 32}, "schedule.epochs": 1}
    plain = train(tiny_recipe(**changes), tmp_path / "plain", quiet=True)
    compiled = train(tiny_recipe(**changes, **{"train.compile": True}), tmp_path / "compiled", quiet=True)
    assert read_metrics(plain.folder)[0] == pytest.approx(read_metrics(compiled.folder)[0], rel=1e-4)
    assert load_run(compiled.folder).labels == ("blue", "green", "red")
