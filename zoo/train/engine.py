"""The training loop: one for every task, on accelerate.

A run is a pure function of its recipe, its data and its number of processes: all randomness is drawn from (seed, step),
so a run that was killed and resumed ends with the same weights and the same metrics as one that was not.
"""

import hashlib
import logging
import math
import platform
import secrets
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import zoo
from zoo.analysis.energy import EnergyMeter
from zoo.config import ModelConfig
from zoo.data.loader import Batch, EpochSampler, Loader, dead_workers_named, derive_seed
from zoo.data.pruning import PRUNING, Pruning
from zoo.errors import Preempted, RecipeError, TrainingError, nearest, reason
from zoo.factory import build
from zoo.layers import DropPath
from zoo.pretrained.load import fit_state_dict, load_state_dict
from zoo.registry import config_of, family_of
from zoo.train import report
from zoo.train.checkpoint import load_checkpoint, save_checkpoint, write
from zoo.train.device import is_out_of_memory, make_accelerator
from zoo.train.partial import batch_norm_momentum, only_head, with_adapters, without_adapters
from zoo.train.progress import Progress
from zoo.train.recipe import Optim, Recipe, Train, load_recipe
from zoo.train.run_folder import RunFolder, read_json, write_json, write_metrics, write_text
from zoo.train.schedule import learning_rate
from zoo.train.scoring import evaluate
from zoo.train.sharding import share_statistics, sharing_of, whole
from zoo.train.tasks import TASKS, eval_loader
from zoo.train.tracking import log, require_trackers, start_trackers, stop_trackers

_logger = logging.getLogger(__name__)

_FUSED = ("adam", "adamw", "sgd")  # torch has one kernel for a whole step of these
# what a checkpoint holds besides tensors
_REMEMBERED = ("step", "epoch", "epoch_step", "loss_sum", "history", "best", "seconds")
# with others of these a run may go on, as with other processes
_MAY_CHANGE = (
    "data.workers",
    "train.micro_batch",
    "train.sharding",
    "train.offload",
    "train.tensorboard",
    "train.wandb",
    "train.log_every",
)
_CHECK_EVERY = 20  # steps between looks at the loss on an accelerator, where each look waits for the device


@dataclass(frozen=True)
class _Step:
    """An optimiser step whose loss nobody has looked at yet, as that may wait for the device."""

    step: int  # steps before it
    rate: float  # its learning rate
    loss: Tensor
    gradient_norm: Tensor | None  # before clipping; None where it is not wanted or not known


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        folder: The run folder.
        metrics: Figures of the weights in ``model.safetensors`` on the held-out part: ``loss`` (nats) and, for
            pictures, ``top1`` and ``top5`` (percent), or ``map`` and ``f1`` where they have several labels; for text
            ``perplexity``.
        epoch: The epoch they are from, counted from 1.
        seconds: Wall-clock time of training and validation, over all sittings.
        raw: Figures of the same epoch's weights without averaging; the same as ``metrics`` where nothing is averaged.
    """

    folder: Path
    metrics: dict[str, float]
    epoch: int
    seconds: float
    raw: dict[str, float]


class _OutOfMemory(TrainingError):
    """A pass had more samples than memory takes.

    Attributes:
        smaller: The size of passes to try next; 0 if there is none.
    """

    def __init__(self, message: str, smaller: int) -> None:
        super().__init__(message)
        self.smaller = smaller


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
        TrainingError: If the loss is not finite, memory runs out, or a checkpoint cannot be written; the last good one
            is kept.
        Preempted: If SIGTERM came; a checkpoint was saved.
    """
    folder = RunFolder(Path(out))
    if folder.recipe.is_file():
        if not resume:
            raise RecipeError(
                f"{folder.path} holds a run already; pass --resume auto to continue it, or another --out."
            )
        _check_same_recipe(folder, recipe)
        if folder.result.is_file():
            return _read_result(folder)
    elif foreign := folder.foreign():
        raise RecipeError(f"{folder.path} holds no run, but is not empty ({foreign[0]}); choose another --out.")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"Cannot make the run folder {folder.path}: {error.strerror}.") from error
    limit: int | None = None  # the recipe's
    while True:
        try:
            return _Run(recipe, folder, quiet=quiet, micro_batch=limit).run()
        except _OutOfMemory as error:
            limit = error.smaller
            if recipe.train.micro_batch >= 0 or not limit:
                raise
        _logger.warning("out of memory: going on with passes of %d samples, accumulated to the same batch", limit)
        release_memory()  # not in the handler, where the traceback still holds the run that failed


class _Run:
    """A sitting of a run.

    Args:
        recipe, folder: What is trained, and where it is kept.
        quiet: Show no progress.
        micro_batch: Instead of the recipe's.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, *, quiet: bool, micro_batch: int | None = None) -> None:
        from timm.utils.model_ema import ModelEmaV3

        report.require_plotting()
        require_trackers(recipe.train)
        self.recipe, self.folder = recipe, folder
        # The number of processes is known only once there is an accelerator, and decides how much it accumulates.
        self.accelerator = make_accelerator(
            recipe.train.precision,
            sharding=recipe.train.sharding,
            offload=recipe.train.offload,
        )
        self._sharing = sharing_of(self.accelerator)
        self._meter = EnergyMeter(self.accelerator.device)
        self.micro_batch, self.accumulate = _passes(recipe.train, self.accelerator.num_processes, micro_batch)
        self.accelerator.gradient_accumulation_steps = self.accumulate
        self.task = TASKS[recipe.task](recipe)
        self.task.check_batch(self.micro_batch)
        size = len(self.task.train_samples)
        # An epoch's length in the schedule; pruned epochs have fewer steps, which stand for as much time.
        self.full_epoch = size // recipe.train.batch_size
        if self.full_epoch == 0:
            raise RecipeError(
                f"train.batch_size {recipe.train.batch_size} is more than the {size} training samples; lower it."
            )
        self.pruning = _make_pruning(recipe, size)
        self.train_loader = self._make_train_loader()
        self.val_loader = eval_loader(self.task.val_samples, recipe, self.micro_batch, self.accelerator)
        model = self.task.model
        if recipe.train.bn_momentum:
            batch_norm_momentum(model, recipe.train.bn_momentum)
        if recipe.train.tune == "head":
            only_head(model)
        elif recipe.train.tune == "lora":
            with_adapters(model, recipe.lora)
        if recipe.train.sync_bn and self.accelerator.num_processes > 1:
            if self.accelerator.device.type == "cpu":
                _logger.warning("train.sync_bn has no effect on CPUs: torch has no such batch norm for them")
            else:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self._drop_paths = [
            (module, module.rate) for module in model.modules() if isinstance(module, DropPath) and module.rate
        ]
        if recipe.train.channels_last and not self._sharing.relays:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = model.to(self.accelerator.device)
        self.peak_rate = _peak_rate(recipe)
        optimizer = _make_optimizer(model, recipe.optim, self.peak_rate)
        self.ema = None
        if recipe.train.ema:
            self.ema = ModelEmaV3(model, decay=recipe.train.ema, use_warmup=recipe.train.ema_warmup)
            self.task.average = self.ema.module
        if recipe.train.compile:
            model.compile()
        self.plain_model = model  # which stays the same within its wrapper
        self.model, self.optimizer = self._sharing.prepare(self.accelerator, model, optimizer, recipe, self.micro_batch)
        if self.ema is not None:
            self._sharing.share_out(self.ema)
        self.progress = Progress(self, quiet=quiet or not self.accelerator.is_main_process)
        self.terminated = False  # SIGTERM has come
        # What a checkpoint remembers.
        self.step = 0  # optimiser steps done
        self.epoch = 0
        self.epoch_step = 0  # of those, in the current epoch
        self.loss_sum = 0.0  # of the current epoch's steps
        self.history: list[dict[str, float]] = []  # a row an epoch
        self.best: dict[str, float] = {}  # the row whose weights are in model.safetensors
        self.seconds = 0.0
        self._unchecked: list[_Step] = []

    def _make_train_loader(self) -> Loader:
        recipe = self.recipe
        sampler = EpochSampler(
            len(self.task.train_samples),
            self.micro_batch,
            shuffle=self.task.shuffle,
            drop_last=True,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            pruning=self.pruning,
            repeats=recipe.augment.repeats,
        )
        data = recipe.data
        return Loader(self.task.train_samples, sampler, workers=data.workers, max_corrupt=data.max_corrupt)

    @property
    def config(self) -> ModelConfig:
        return config_of(self.plain_model)

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps of the current epoch."""
        return self.train_loader.sampler.epoch_size // self.recipe.train.batch_size

    @property
    def _skipped(self) -> dict[str, str]:
        """What could not be read so far: where it is, and why."""
        return self.train_loader.skipped | self.val_loader.skipped

    def run(self) -> Result:
        """Train from where the folder's checkpoint is, or from the start."""
        recipe, folder = self.recipe, self.folder
        if self.accelerator.is_main_process:
            folder.sweep()
        if folder.checkpoint.is_file():
            self._restore()
        elif self.accelerator.is_main_process:
            self._open_folder()
        if self.accelerator.is_main_process:
            start_trackers(self.accelerator, recipe, folder, done=self.step)
        self.progress.announce()
        self._clock = time.perf_counter()
        try:
            try:
                with self.progress, _on_sigterm(self._terminate), dead_workers_named():
                    while not self._finished:
                        self._train_epoch()
                        self._finish_epoch()
            finally:
                stop_trackers(self.accelerator)
                self.train_loader.close()
                self.val_loader.close()
            with dead_workers_named():
                return self._end()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from error

    def _end(self) -> Result:
        """Write the report and the result."""
        folder = self.folder
        raw = _figures(self.best, "val_")
        result = Result(folder.path, _figures(self.best), int(self.best["epoch"]), self.seconds, raw)
        if self.accelerator.is_main_process:
            report.plot_curves(self.history, folder.curves)
            self._write_report(result)
            self.progress.end(len(self._skipped))
            values = {"metrics": result.metrics, "raw": raw, "epoch": result.epoch, "seconds": result.seconds}
            write_json(folder.result, values)
        self.accelerator.wait_for_everyone()
        return result

    @property
    def _finished(self) -> bool:
        if self.epoch >= self.recipe.schedule.epochs:
            return True
        patience = self.recipe.train.patience
        return bool(patience and self.best and self.epoch - self.best["epoch"] >= patience)

    def _write_report(self, result: Result) -> None:
        """One page about the run. The model shown is that of ``model.safetensors``, whichever epoch it is from."""
        recipe, scoring = self.recipe, self.task.scoring
        # A model that is shared out runs on all processes or on none, and this is the main one alone.
        as_built = not self._sharing.splits and recipe.train.tune != "lora"
        model = self.plain_model if as_built else build(self.config)
        fit_state_dict(model, load_state_dict(self.folder.weights), family_of(self.config))
        model.to(self.accelerator.device).eval()
        last = self.history[-1]
        kind = "averaged" if self.ema is not None else "raw"
        facts = [("kept", f"{kind} weights of epoch {result.epoch}: {scoring.headline(result.metrics)}")]
        for prefix, name in (("val_", "last epoch, raw weights"), ("ema_", "last epoch, averaged weights")):
            if figures := {key.removeprefix(prefix): last[key] for key in last if key.startswith(prefix)}:
                facts.append((name, scoring.headline(figures)))
        samples = self.step * recipe.train.batch_size
        facts += [
            ("time", f"{result.seconds / 60:.1f} minutes, with validation"),
            ("samples", f"{samples:,} in {self.step:,} steps; {samples / result.seconds:.1f} a second"),
            ("peak memory", f"{_peak_memory(self.accelerator.device) / 1e6:,.0f} MB, of this sitting and process"),
            ("energy", self._energy()),
            ("processes", f"{self.accelerator.num_processes} on {self.accelerator.device.type}"),
            ("seed", str(recipe.seed)),
        ]
        title = f"{recipe.model.name} on {recipe.data.name}"
        page = report.Page(title, self.history, facts, skipped=self._skipped)
        self.task.illustrate(page, model, self.accelerator, self.micro_batch)
        report.write_report(page, self.folder.report)

    def _energy(self) -> str:
        self._meter.update()
        if self._meter.joules is None:
            return f"not known: {self._meter.source}"
        return f"{self._meter.joules / 3.6e6:.4f} kWh, of this sitting ({self._meter.source})"

    def _terminate(self) -> None:
        self.terminated = True

    def _train_epoch(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        # Also after the epoch's last step, should a kill have come just then: the epoch then has no batch left.
        self.train_loader.set_epoch(self.epoch, self.epoch_step * recipe.train.batch_size)
        if not self.epoch_steps:
            raise RecipeError(
                f"data.pruning leaves {self.train_loader.sampler.epoch_size} samples of epoch {self.epoch + 1}, fewer "
                f"than train.batch_size {recipe.train.batch_size}; lower that or data.prune_fraction."
            )
        self.progress.start_epoch()
        self.model.train()
        if recipe.train.tune == "head":
            self.plain_model.eval()  # the features are those of evaluation, and batch statistics stay as they are
        batches = iter(self.train_loader)
        alone = accelerator.num_processes == 1
        while self.epoch_step < self.epoch_steps:
            self._step(batches)
            last = self.epoch_step == self.epoch_steps
            if recipe.train.save_steps and not last and self.step % recipe.train.save_steps == 0:
                self._save()
            if self.terminated and alone:
                self._stop()
        self._check()
        self.progress.end_epoch()

    def _step(self, batches: Iterator[Batch]) -> None:
        """An optimiser step with all that surrounds it."""
        accelerator = self.accelerator
        rate = self._set_learning_rate()
        # Dropout and stochastic depth draw from here: a function of the step alone.
        torch.manual_seed(derive_seed(self.recipe.seed, self.step, accelerator.process_index))
        if set_step := getattr(self.plain_model, "set_step", None):
            set_step(self.step)  # what changes over training, such as capacities, is a function of the step too
        self.task.share = (self.epoch + self.epoch_step / self.epoch_steps) / self.recipe.schedule.epochs
        if self.recipe.train.drop_path_grows:
            for module, final in self._drop_paths:
                module.rate = final * self.task.share
        loss, norm = self._optimiser_step(batches)
        self._unchecked.append(_Step(self.step, rate, loss, norm))
        self.step += 1
        self.epoch_step += 1
        share_statistics(accelerator, self.plain_model)
        if self.ema is not None:
            self._sharing.update(self.ema, self.plain_model, self.step)
        alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
        if alone or len(self._unchecked) >= _CHECK_EVERY:
            self._check_losses()
        self.progress.advance(self.loss_sum / max(self.epoch_step - len(self._unchecked), 1))

    def _set_learning_rate(self) -> float:
        share = self.epoch_step / self.epoch_steps
        rate = learning_rate(self.recipe.schedule, self.peak_rate, self.epoch + share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    @property
    def _learning_rate(self) -> float:
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)

    def _optimiser_step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor | None]:
        """One optimiser step over ``accumulate`` batches; returns their mean loss, detached, and what _clip does."""
        recipe, accelerator = self.recipe, self.accelerator
        means, norm = [], None
        for micro in range(self.accumulate):
            batch = self.task.scoring.prepare(next(batches), accelerator.device)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    losses = self.task.losses(
                        self.model, batch, recipe.seed, self.step, micro, accelerator.process_index
                    )
                loss = losses.mean()
                means.append(loss.detach())
                if self.pruning is not None:
                    self.pruning.update(batch.indices, losses.detach())
                    loss = (losses * self.pruning.weights_of(batch.indices)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return torch.stack(means).mean(), norm

    def _clip(self) -> Tensor | None:
        """Clip the gradients, if the recipe says so; returns their norm before that, if this step is to be logged."""
        from timm.utils.clip_grad import dispatch_clip_grad

        optim, logged = self.recipe.optim, self._is_logged(self.step)
        if optim.clip_mode == "norm" and (optim.clip or self._sharing.clips):
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), optim.clip)
            return norm if logged else None
        if not (optim.clip or logged):
            return None
        self.accelerator.unscale_gradients()
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        norm = get_total_norm(gradients) if logged and gradients else None
        if optim.clip:
            dispatch_clip_grad(self.model.parameters(), optim.clip, mode=optim.clip_mode)
        return norm

    def _is_logged(self, step: int) -> bool:
        """Whether the trackers get a row of the step that comes after so many."""
        train = self.recipe.train
        return bool((train.tensorboard or train.wandb) and train.log_every and (step + 1) % train.log_every == 0)

    def _check_losses(self) -> None:
        """Add up and log the losses since the last look, over all processes; stop at one that is not finite."""
        self._meter.update()
        if not self._unchecked:
            return
        losses = torch.stack([each.loss for each in self._unchecked])
        if self.accelerator.num_processes > 1:
            # Whether to stop is exchanged with the losses, as all processes must do so after the same step.
            signal = losses.new_tensor([float(self.terminated)])
            losses = self.accelerator.reduce(torch.cat([losses, signal]), "mean")
            self.terminated, losses = bool(losses[-1] > 0), losses[:-1]
        for each, value in zip(self._unchecked, losses.tolist(), strict=True):
            if not math.isfinite(value):
                raise self._diverged(f"The loss is {value}", each.step, each.rate)
            self.loss_sum += value
            if self._is_logged(each.step):
                self._log_step(each, value)
        self._unchecked.clear()
        if self.terminated and self.accelerator.num_processes > 1:
            self._stop()

    def _log_step(self, step: _Step, loss: float) -> None:
        figures = {"step/loss": loss, "step/learning_rate": step.rate}
        if step.gradient_norm is not None:
            figures["step/gradient_norm"] = float(whole(step.gradient_norm))  # gathered by all processes
        log(self.accelerator, figures, step.step + 1)

    def _check(self) -> None:
        """Stop before a checkpoint is written from a loss, or from weights, that are not finite."""
        self._check_losses()
        # A step can spoil the weights while its own loss, taken before it, is still finite.
        tensors = [tensor for tensor in self._sharing.held(self.plain_model) if tensor.is_floating_point()]
        device = self.accelerator.device  # not that of all of them, with train.offload
        spoilt = ~torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).all()
        if self._sharing.splits:  # only the process that has the part sees it
            spoilt = self.accelerator.reduce(spoilt.float()) > 0
        if spoilt:
            raise self._diverged("The weights are no longer finite", self.step - 1, self._learning_rate)

    def _stop(self) -> None:
        """Save and stop, as the system asks when it needs the machine for something else."""
        self._save()
        raise Preempted(
            f"Stopped by SIGTERM after step {self.step}; {self.folder.checkpoint} is saved, "
            "--resume auto goes on there."
        )

    def _diverged(self, what: str, step: int, rate: float) -> TrainingError:
        kept = f"the last good checkpoint is {self.folder.checkpoint}"
        if not self.folder.checkpoint.is_file():
            kept = "no checkpoint had been written yet"
        advice = "lower optim.lr or set optim.clip"
        if self.recipe.train.precision == "fp16":
            advice += ", or use train.precision='bf16'"
        return TrainingError(
            f"{what} at step {step} (epoch {self.epoch + 1}), learning rate {rate:.3g}; "
            f"{kept}. To go on, {advice}, in another --out."
        )

    def _out_of_memory(self) -> TrainingError:
        train = self.recipe.train
        advice = [f"lower train.micro_batch (now {self.micro_batch}), which leaves the batch of a step as it is"]
        if train.precision == "fp32":
            advice.append("use train.precision='bf16'")
        if not train.checkpoint_activations:
            advice.append("set train.checkpoint_activations=true")
        return _OutOfMemory(
            f"Out of memory at step {self.step}. To go on, {', or '.join(advice)}.", self._smaller_passes()
        )

    def _smaller_passes(self) -> int:
        """The largest size of passes, of at most half of the present one's, that fits batch and task; 0 for none."""
        for size in range(self.micro_batch // 2, 0, -1):
            if self.micro_batch * self.accumulate % size == 0:
                with suppress(RecipeError):
                    self.task.check_batch(size)
                    return size
        return 0

    def _finish_epoch(self) -> None:
        recipe, accelerator, scoring = self.recipe, self.accelerator, self.task.scoring
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "learning_rate": self._learning_rate,
            "train_loss": self.loss_sum / max(self.epoch_steps, 1),
        }
        candidates = {"val": self.plain_model}
        if self.ema is not None:
            candidates["ema"] = self.ema.module
        for name, model in candidates.items():
            figures = evaluate(model, self.val_loader, scoring, accelerator)
            row.update({f"{name}_{key}": value for key, value in figures.items()})
        self.history.append(row)
        if self.pruning is not None:
            self.pruning.end_epoch(accelerator)
        self.epoch, self.epoch_step, self.loss_sum = self.epoch + 1, 0, 0.0
        chosen = "ema" if self.ema is not None else "val"
        metric, sign = f"{chosen}_{scoring.best}", 1 if scoring.higher_is_better else -1
        if recipe.train.keep == "last" or not self.best or sign * row[metric] > sign * self.best[metric]:
            self.best = row
            state = dict(self._sharing.state(without_adapters(candidates[chosen])))
            if accelerator.is_main_process:
                write(self.folder.weights, state, self._weights_metadata())
        # Before the checkpoint, so that what a resumed run has behind it is all there.
        log(accelerator, {key: value for key, value in row.items() if key not in ("epoch", "step")}, self.step)
        self._save()
        if accelerator.is_main_process:
            write_metrics(self.folder.metrics, self.history)
        self.progress.finish_epoch(row)

    def _weights_metadata(self) -> dict[str, str]:
        return {"format": "pt", "zoo_version": zoo.__version__, "config": self.config.to_json()}

    def _save(self) -> None:
        self._check()
        if self.pruning is not None:
            self.pruning.gather(self.accelerator)
        if self.accelerator.num_processes > 1:
            for skipped in gather_object([self.train_loader.skipped]):
                self.train_loader.skipped |= skipped
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        progress = {name: getattr(self, name) for name in _REMEMBERED}
        scaler = getattr(self.accelerator, "scaler", None)
        progress["scaler"] = scaler.state_dict() if scaler is not None else None
        progress["skipped"] = self.train_loader.skipped
        save_checkpoint(
            self.folder.checkpoint,
            self.plain_model,
            self.ema.module if self.ema is not None else None,
            self._plain_optimizer,
            progress,
            self.pruning.state() if self.pruning is not None else {},
            sharing=self._sharing,
            writes=self.accelerator.is_main_process,
        )
        self.accelerator.wait_for_everyone()

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _restore(self) -> None:
        ema = self.ema.module if self.ema is not None else None
        progress, sampler = load_checkpoint(
            self.folder.checkpoint, self.plain_model, ema, self._plain_optimizer, sharing=self._sharing
        )
        for name in _REMEMBERED:
            setattr(self, name, progress[name])
        self.train_loader.skipped |= progress["skipped"]
        if self.pruning is not None:
            self.pruning.load_state(sampler)
        if progress["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        if self.history and self.accelerator.is_main_process:  # a kill may have come between the two files
            write_metrics(self.folder.metrics, self.history)
        _logger.info("resumed %s at step %d", self.folder.path, self.step)

    def _open_folder(self) -> None:
        """Write what describes the run; the recipe comes last, as it marks the folder as taken."""
        folder, text = self.folder, self.recipe.to_toml()
        self.task.write_record(folder, self.config)
        write_json(folder.environment, _environment(self.accelerator, self.recipe.train.precision))
        write_json(
            folder.manifest,
            {
                "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "data_sha256": self.task.data_hash(),
                "code_sha256": _code_hash(),
                "zoo": zoo.__version__,
                "id": secrets.token_hex(8),
            },
        )
        write_text(folder.recipe, text)


@contextmanager
def _on_sigterm(react: Callable[[], None]) -> Iterator[None]:
    """Call ``react`` when SIGTERM comes; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _passes(train: Train, world: int, limit: int | None = None) -> tuple[int, int]:
    """Samples per process and forward pass, and passes per optimiser step, that make the recipe's batch.

    Args:
        train: The recipe's section.
        world: Processes.
        limit: Most samples per process and pass, instead of the recipe's; 0 for none.

    Raises:
        RecipeError: If the batch cannot be shared out among the processes.
    """
    if train.batch_size % world:
        nearest_size = max(round(train.batch_size / world), 1) * world
        raise RecipeError(
            f"train.batch_size is {train.batch_size}, which {world} processes cannot share equally; the nearest that "
            f"they can is {nearest_size}."
        )
    each = train.batch_size // world
    if limit is None:
        limit = max(train.micro_batch, 0)
    limit = min(limit or each, each)
    micro = next(size for size in range(limit, 0, -1) if each % size == 0)
    return micro, each // micro


def _peak_rate(recipe: Recipe) -> float:
    """The learning rate at the end of the warm-up, grown by the recipe's rule if its batch is not the one lr is for."""
    optim = recipe.optim
    if not optim.lr_batch:
        return optim.lr
    ratio = recipe.train.batch_size / optim.lr_batch
    return optim.lr * (ratio if optim.lr_rule == "linear" else math.sqrt(ratio))


def _make_pruning(recipe: Recipe, size: int) -> Pruning | None:
    if not recipe.data.pruning:
        return None
    return PRUNING[recipe.data.pruning](
        size, fraction=recipe.data.prune_fraction, epochs=recipe.schedule.epochs, seed=recipe.seed
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # which accelerate brings

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _code_hash() -> str:
    """SHA-256 of the package's source files, in hexadecimal."""
    root = Path(zoo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _make_optimizer(model: nn.Module, optim: Optim, rate: float) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    names = [str(name) for name in list_optimizers()]
    if optim.name not in names:
        raise RecipeError(f"optim.name is {optim.name!r}, which timm does not know.{nearest(optim.name, names)}")
    options: dict[str, Any] = {"fused": True} if optim.name in _FUSED else {}
    if optim.eps:
        options["eps"] = optim.eps
    if optim.betas:
        options["betas"] = optim.betas
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=optim.name,
            lr=rate,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay if optim.layer_decay != 1.0 else None,
            **options,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"optim.name is {optim.name!r}, which does not work here: {reason(error)}.") from error
    _scale_rates(optimizer, model)
    return optimizer


def _scale_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give parameters that a model names in ``rate_scales``, by the beginning of their names, groups of their own."""
    for prefix, scale in getattr(model, "rate_scales", {}).items():
        theirs = {id(each) for name, each in model.named_parameters() if name.startswith(prefix)}
        for group in list(optimizer.param_groups):
            moved = [each for each in group["params"] if id(each) in theirs]
            if moved:
                group["params"] = [each for each in group["params"] if id(each) not in theirs]
                lr_scale = scale * group.get("lr_scale", 1.0)
                optimizer.add_param_group({**group, "params": moved, "lr_scale": lr_scale})


def _figures(row: dict[str, float], prefix: str = "") -> dict[str, float]:
    """The figures of the weights that were kept, the average's where there is one, or those that ``prefix`` names."""
    prefix = prefix or ("ema_" if any(key.startswith("ema_") for key in row) else "val_")
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def _read_result(folder: RunFolder) -> Result:
    values = read_json(folder.result)
    return Result(folder.path, values["metrics"], values["epoch"], values["seconds"], values["raw"])


def _check_same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    # Both by way of TOML, which knows no tuples.
    old, new = (_flat(tomllib.loads(each.to_toml())) for each in (load_recipe(folder.recipe), recipe))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key not in _MAY_CHANGE)
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


def _environment(accelerator: Accelerator, precision: str) -> dict[str, Any]:
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
        "distributed": accelerator.distributed_type.value,
        "precision": precision,
    }
