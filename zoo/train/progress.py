"""A progress bar with throughput and time left on a terminal; one line an epoch elsewhere."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from zoo.train.engine import _Run


class Progress:
    """Shows how far a run is."""

    def __init__(self, run: _Run, *, quiet: bool) -> None:
        self.run = run
        self.console = Console(quiet=quiet)
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal or "CI" in os.environ,
            transient=True,
        )
        self.task: TaskID | None = None
        self.resumed_at = 0  # step at which this sitting's part of the epoch began
        self.started = 0.0
        self.last_rate = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    @property
    def samples_per_step(self) -> int:
        return self.run.recipe.train.batch_size

    def announce(self) -> None:
        """Called before the first epoch: says how the recipe's batch and rate are reached, where that is not plain."""
        run, world = self.run, self.run.accelerator.num_processes
        parts = []
        if world > 1 or run.accumulate > 1:
            parts.append(
                f"batch of {self.samples_per_step} = {world} processes x {run.micro_batch} samples x "
                f"{run.accumulate} passes"
            )
        if run.peak_rate != run.recipe.optim.lr:
            parts.append(
                f"learning rate {run.peak_rate:.4g} for it, by the {run.recipe.optim.lr_rule} rule from "
                f"{run.recipe.optim.lr:g} at {run.recipe.optim.lr_batch}"
            )
        if parts:
            self.console.print("; ".join(parts), highlight=False, soft_wrap=True)

    def start_epoch(self) -> None:
        """Called before the first step of an epoch, or before the next one after resuming."""
        epochs = self.run.recipe.schedule.epochs
        if self.task is None:
            total = epochs * self.run.full_epoch
            self.task = self.bar.add_task("", total=total, completed=self.run.step, epoch="", loss="-", rate="-")
        self.bar.update(self.task, epoch=f"{self.run.epoch + 1}/{epochs}")
        self.resumed_at, self.started = self.run.step, time.perf_counter()

    def advance(self, loss: float) -> None:
        """Called after every step with the epoch's mean loss so far."""
        assert self.task is not None
        self.bar.update(self.task, completed=self.run.step, loss=f"{loss:.4f}", rate=f"{self._rate():.0f}")

    def end_epoch(self) -> None:
        """Called after the last step of an epoch, before its evaluation."""
        self.last_rate = self._rate()

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Called with an epoch's metrics."""
        parts = [f"epoch {int(row['epoch'])}/{self.run.recipe.schedule.epochs}", f"loss {row['train_loss']:.4f}"]
        headline = self.run.task.scoring.headline
        for prefix, name in (("val_", "held-out"), ("ema_", "averaged weights")):
            figures = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
            if figures:
                parts.append(f"{name} {headline(figures)}")
        parts.append(f"{self.last_rate:.0f} samples/s")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def end(self, skipped: int) -> None:
        """Called when the report is written."""
        if skipped:
            self.console.print(f"{skipped} samples could not be read; report.html lists them", highlight=False)

    def _rate(self) -> float:
        steps = self.run.step - self.resumed_at
        return steps * self.samples_per_step / max(time.perf_counter() - self.started, 1e-9)
