"""The training loop: one for every task, on accelerate.

A run is a pure function of its recipe, its data and its number of processes: all randomness is drawn from (seed, step),
so a run that was killed and resumed ends with the same weights and the same metrics as one that was not.
"""

import logging
import math
import platform
import time
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import zoo
from zoo.config import ModelConfig
from zoo.data.image import decode_image
from zoo.data.loader import Batch, derive_seed
from zoo.errors import RecipeError, TrainingError, nearest, reason, require
from zoo.train import report
from zoo.train.checkpoint import load_checkpoint, save_checkpoint, write
from zoo.train.device import make_accelerator
from zoo.train.progress import Progress
from zoo.train.recipe import Optim, Recipe, load_recipe
from zoo.train.run_folder import ModelRecord, RunFolder, read_json, write_file, write_json, write_metrics, write_text
from zoo.train.tasks import TASKS, evaluate

_logger = logging.getLogger(__name__)

_FUSED = ("adam", "adamw", "sgd")  # torch has one kernel for a whole step of these
_CHECK_EVERY = 20  # steps between looks at the loss on an accelerator, where each look waits for the device


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        folder: The run folder.
        metrics: Figures of the weights in ``model.safetensors`` on the held-out part: ``loss``, ``top1``, ``top5``.
        epoch: The epoch they are from, counted from 1.
        seconds: Wall-clock time of training and validation, over all sittings.
    """

    folder: Path
    metrics: dict[str, float]
    epoch: int
    seconds: float


def train(recipe: Recipe, out: str | Path, *, resume: bool = False, quiet: bool = False) -> Result:
    """Train as the recipe says, into the run folder ``out``.

    Args:
        recipe: What to train, on what, how.
        out: The run folder. It must be new or empty unless ``resume`` is given.
        resume: Continue from the folder's checkpoint if it has one; a finished run is returned as it is.
        quiet: Show no progress.

    Raises:
        RecipeError: If the folder is in use and ``resume`` is not given, holds a run of another recipe or something
            else; if the recipe does not fit its model, its data or this machine.
        DataError: If the data cannot be read.
        TrainingError: If the loss is not finite or a checkpoint cannot be written; the last good one is kept.
    """
    folder = RunFolder(Path(out))
    if folder.recipe.is_file():
        if not resume:
            raise RecipeError(f"{folder.path} holds a run already; pass --resume to continue it, or another --out.")
        _check_same_recipe(folder, recipe)
        if folder.result.is_file():
            return _read_result(folder)
    elif foreign := folder.foreign():
        raise RecipeError(f"{folder.path} holds no run, but is not empty ({foreign[0]}); choose another --out.")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"Cannot make the run folder {folder.path}: {error.strerror}.") from error
    return _Run(recipe, folder, quiet=quiet).run()


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder, *, quiet: bool) -> None:
        from timm.scheduler.cosine_lr import CosineLRScheduler
        from timm.utils.model_ema import ModelEmaV3

        report.require_plotting()
        if recipe.train.tensorboard:
            require("tensorboard", extra="train", why="train.tensorboard")
        self.recipe, self.folder = recipe, folder
        self.accelerator = make_accelerator(
            recipe.train.precision,
            gradient_accumulation_steps=recipe.train.accumulate,
            log_with="tensorboard" if recipe.train.tensorboard else None,
            project_dir=folder.path,
        )
        self.task = TASKS[recipe.task](recipe)
        self.train_loader = self.task.train_loader(self.accelerator)
        self.val_loader = self.task.val_loader(self.accelerator)
        self.steps_per_epoch = len(self.train_loader) // recipe.train.accumulate
        if self.steps_per_epoch == 0:
            raise RecipeError(
                f"train.batch_size {recipe.train.batch_size} x accumulate {recipe.train.accumulate} is more than the "
                f"{len(self.train_loader.samples)} training samples; lower one of them."
            )
        model = self.task.model
        if recipe.train.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = model.to(self.accelerator.device)
        optimizer = _make_optimizer(model, recipe.optim)
        self.ema = ModelEmaV3(model, decay=recipe.train.ema, use_warmup=True) if recipe.train.ema else None
        schedule = recipe.schedule
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=schedule.epochs * self.steps_per_epoch,
            lr_min=schedule.min_lr,
            warmup_t=round(schedule.warmup_epochs * self.steps_per_epoch),
            warmup_lr_init=schedule.warmup_lr,
            t_in_epochs=False,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.progress = Progress(self, quiet=quiet or not self.accelerator.is_main_process)
        # What a checkpoint remembers.
        self.step = 0  # optimiser steps done
        self.loss_sum = 0.0  # of the current epoch's steps
        self.history: list[dict[str, float]] = []  # a row an epoch
        self.best: dict[str, float] = {}  # the row whose weights are in model.safetensors
        self.seconds = 0.0
        self._unchecked: list[tuple[int, float, Tensor]] = []  # (step, learning rate, loss) not looked at yet

    @property
    def plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def config(self) -> ModelConfig:
        return typing.cast(ModelConfig, self.plain_model.config)

    def run(self) -> Result:
        """Train from where the folder's checkpoint is, or from the start."""
        recipe, folder = self.recipe, self.folder
        if self.accelerator.is_main_process:
            folder.sweep()
        if folder.checkpoint.is_file():
            self._restore()
        elif self.accelerator.is_main_process:
            self._open_folder()
        if recipe.train.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        self._clock = time.perf_counter()
        try:
            with self.progress:
                for epoch in range(self.step // self.steps_per_epoch, recipe.schedule.epochs):
                    self._train_epoch(epoch)
                    self._finish_epoch(epoch)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.train_loader.close()
            self.val_loader.close()
        result = Result(folder.path, _figures(self.best), int(self.best["epoch"]), self.seconds)
        if self.accelerator.is_main_process:
            report.plot_curves(self.history, folder.curves)
            write_json(folder.result, {"metrics": result.metrics, "epoch": result.epoch, "seconds": result.seconds})
        self.accelerator.wait_for_everyone()
        return result

    def _train_epoch(self, epoch: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        first = self.step - epoch * self.steps_per_epoch
        self.train_loader.set_epoch(epoch, first * self.progress.samples_per_step)
        self.progress.start_epoch(epoch)
        self.model.train()
        batches = iter(self.train_loader)
        for _ in range(first, self.steps_per_epoch):
            learning_rate = self._set_learning_rate()
            # Dropout and stochastic depth draw from here: a function of the step alone.
            torch.manual_seed(derive_seed(recipe.seed, self.step, accelerator.process_index))
            loss = self._optimiser_step(batches)
            self._unchecked.append((self.step, learning_rate, loss))
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.plain_model, step=self.step)
            if accelerator.device.type == "cpu" or len(self._unchecked) >= _CHECK_EVERY:
                self._check_losses()
            looked_at = self.step - epoch * self.steps_per_epoch - len(self._unchecked)
            self.progress.advance(self.loss_sum / max(looked_at, 1))
            done = self.step % self.steps_per_epoch
            if recipe.train.save_steps and done and self.step % recipe.train.save_steps == 0:
                self._save()
        self._check()
        self.progress.end_epoch()

    def _set_learning_rate(self) -> float:
        self.scheduler.step_update(self.step)
        return self._learning_rate

    @property
    def _learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _optimiser_step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimiser step over ``accumulate`` batches; returns their mean loss, detached."""
        recipe, accelerator = self.recipe, self.accelerator
        losses = []
        for micro in range(recipe.train.accumulate):
            batch = self.task.prepare(next(batches), accelerator.device)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.task.loss(self.model, batch, recipe.seed, self.step, micro, accelerator.process_index)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.optim.clip:
                    self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return torch.stack(losses).mean()

    def _clip(self) -> None:
        from timm.utils.clip_grad import dispatch_clip_grad

        optim = self.recipe.optim
        if optim.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(self.model.parameters(), optim.clip)
            return
        self.accelerator.unscale_gradients()
        dispatch_clip_grad(self.model.parameters(), optim.clip, mode=optim.clip_mode)

    def _check_losses(self) -> None:
        """Add up the losses since the last look, and stop at one that is not finite."""
        for step, learning_rate, loss in self._unchecked:
            value = loss.item()
            if not math.isfinite(value):
                raise self._diverged(f"The loss is {value}", step, learning_rate)
            self.loss_sum += value
        self._unchecked.clear()

    def _check(self) -> None:
        """Stop before a checkpoint is written from a loss, or from weights, that are not finite."""
        self._check_losses()
        # A step can spoil the weights while its own loss, taken before it, is still finite.
        tensors = [tensor for tensor in self.plain_model.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise self._diverged("The weights are no longer finite", self.step - 1, self._learning_rate)

    def _diverged(self, what: str, step: int, learning_rate: float) -> TrainingError:
        kept = f"the last good checkpoint is {self.folder.checkpoint}"
        if not self.folder.checkpoint.is_file():
            kept = "no checkpoint had been written yet"
        advice = "lower optim.lr or set optim.clip"
        if self.recipe.train.precision == "fp16":
            advice += ", or use train.precision='bf16'"
        return TrainingError(
            f"{what} at step {step} (epoch {step // self.steps_per_epoch + 1}), learning rate {learning_rate:.3g}; "
            f"{kept}. To go on, {advice}, in another --out."
        )

    def _finish_epoch(self, epoch: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        row: dict[str, float] = {
            "epoch": epoch + 1,
            "step": self.step,
            "learning_rate": self._learning_rate,
            "train_loss": self.loss_sum / self.steps_per_epoch,
        }
        candidates = {"val": self.plain_model}
        if self.ema is not None:
            candidates["ema"] = self.ema.module
        for name, model in candidates.items():
            figures = evaluate(model, self.val_loader, self.task.prepare, accelerator)
            row.update({f"{name}_{key}": value for key, value in figures.items()})
        self.history.append(row)
        self.loss_sum = 0.0
        chosen = "ema" if self.ema is not None else "val"
        metric = f"{chosen}_{self.task.best_metric}"
        if recipe.train.keep == "last" or not self.best or row[metric] > self.best[metric]:
            self.best = row
            if accelerator.is_main_process:
                write(self.folder.weights, candidates[chosen].state_dict(), self._weights_metadata())
        self._save()
        if accelerator.is_main_process:
            write_metrics(self.folder.metrics, self.history)
        if recipe.train.tensorboard:
            accelerator.log({key: value for key, value in row.items() if key not in ("epoch", "step")}, step=self.step)
        self.progress.finish_epoch(row)

    def _weights_metadata(self) -> dict[str, str]:
        return {"format": "pt", "zoo_version": zoo.__version__, "config": self.config.to_json()}

    def _save(self) -> None:
        self._check()
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if self.accelerator.is_main_process:
            scaler = getattr(self.accelerator, "scaler", None)
            progress = {
                "step": self.step,
                "loss_sum": self.loss_sum,
                "history": self.history,
                "best": self.best,
                "seconds": self.seconds,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            ema = self.ema.module if self.ema is not None else None
            save_checkpoint(self.folder.checkpoint, self.plain_model, ema, self._plain_optimizer, progress)
        self.accelerator.wait_for_everyone()

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _restore(self) -> None:
        ema = self.ema.module if self.ema is not None else None
        progress = load_checkpoint(self.folder.checkpoint, self.plain_model, ema, self._plain_optimizer)
        self.step = progress["step"]
        self.loss_sum = progress["loss_sum"]
        self.history = progress["history"]
        self.best = progress["best"]
        self.seconds = progress["seconds"]
        if progress["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        if self.history and self.accelerator.is_main_process:  # a kill may have come between the two files
            write_metrics(self.folder.metrics, self.history)
        _logger.info("resumed %s at step %d", self.folder.path, self.step)

    def _open_folder(self) -> None:
        """Write what describes the run; the recipe comes last, as it marks the folder as taken."""
        task, folder = self.task, self.folder
        record = ModelRecord(self.recipe.model.name, self.config, task.preprocessing, task.classes)
        record.write(folder)
        write_json(folder.environment, _environment(self.accelerator))
        index = int(task.val_indices[0])
        sample = decode_image(task.val_source.encoded(index), task.val_source.describe(index))
        with write_file(folder.sample) as file:
            sample.save(file, "PNG")
        write_text(folder.recipe, self.recipe.to_toml())


def _make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    names = [str(name) for name in list_optimizers()]
    if optim.name not in names:
        raise RecipeError(f"optim.name is {optim.name!r}, which timm does not know.{nearest(optim.name, names)}")
    options: dict[str, Any] = {"fused": True} if optim.name in _FUSED else {}
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay if optim.layer_decay != 1.0 else None,
            **options,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"optim.name is {optim.name!r}, which does not work here: {reason(error)}.") from error


def _figures(row: dict[str, float]) -> dict[str, float]:
    """The figures of the weights that were kept: the average's where there is one."""
    prefix = "ema_" if any(key.startswith("ema_") for key in row) else "val_"
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def _read_result(folder: RunFolder) -> Result:
    values = read_json(folder.result)
    return Result(folder.path, values["metrics"], values["epoch"], values["seconds"])


def _check_same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    # Both by way of TOML, which knows no tuples.
    old, new = (_flat(tomllib.loads(each.to_toml())) for each in (load_recipe(folder.recipe), recipe))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise RecipeError(
            f"{folder.path} holds a run of another recipe: {_listed(changed, old, new)}. Choose another --out."
        )


def _listed(changed: list[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    """``"optim.lr was 0.001, is 0.01"`` for the first few that differ."""
    shown = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:5]]
    return "; ".join(shown) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    import accelerate
    import timm

    device = accelerator.device
    return {
        "zoo": zoo.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
    }
