"""The figures of epochs and of steps in TensorBoard and Weights & Biases, through accelerate's trackers."""

import logging
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from zoo.errors import TrainingError, reason, require
from zoo.train.recipe import Recipe, Train
from zoo.train.run_folder import RunFolder, read_json

_logger = logging.getLogger(__name__)


def require_trackers(train: Train) -> None:
    """Raise :class:`~zoo.errors.MissingExtraError` if a recipe names a tracker whose package is not installed."""
    if train.tensorboard:
        require("tensorboard", extra="train", why="train.tensorboard")
    if train.wandb:
        require("wandb", extra="wandb", why="train.wandb")


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: RunFolder, *, done: int) -> None:
    """Start what the recipe names, on the main process; both write into the run folder.

    Where a kill came after a checkpoint, the run does some steps a second time, and logs the same of them: TensorBoard
    then forgets what came after ``done`` the first time, Weights & Biases keeps it and refuses the second.

    Args:
        accelerator: Whose ``log`` they are to follow.
        recipe: Which trackers; Weights & Biases also keeps it as the run's config.
        done: Steps that the run has behind it.
        folder: The run's; its manifest has the id under which a resumed run goes on as the same.

    Raises:
        TrainingError: If Weights & Biases cannot be logged in to or reached, or the disk is full.
    """
    trackers: list[GeneralTracker] = []
    if recipe.train.tensorboard:
        trackers.append(TensorBoardTracker("tensorboard", folder.path, purge_step=done + 1))
    if recipe.train.wandb:
        options: dict[str, Any] = {"config": recipe.to_dict(), "dir": str(folder.path), "name": folder.path.name}
        options |= {
            "id": read_json(folder.manifest).get("id"),
            "resume": "allow",
            "settings": {"console": "off"},
        }  # the progress bar is no log
        trackers.append(WandBTracker(recipe.train.wandb, **options))
    accelerator.log_with = trackers  # made here, as each has a name and options of its own
    try:
        accelerator.init_trackers("")
    except OSError as error:
        raise _not_written(error) from error
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        raise TrainingError(
            f"Weights & Biases does not start: {reason(error)}. Run `wandb login`, or set WANDB_MODE=offline or "
            "train.wandb=''; then go on with --resume auto."
        ) from error


def log(accelerator: Accelerator, figures: dict[str, float], step: int) -> None:
    """Give the trackers a row, if there are any; ``step`` is how many optimiser steps are done.

    Raises:
        TrainingError: If it cannot be written (a full disk).
    """
    if accelerator.trackers:
        try:
            accelerator.log(figures, step=step)
        except OSError as error:
            raise _not_written(error) from error


def stop_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they still hold; a run that ends for another reason is to say that one."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except OSError as error:
            _logger.warning("the last rows for TensorBoard are lost: %s", error.strerror or error)


def _not_written(error: OSError) -> TrainingError:
    return TrainingError(
        f"Cannot write rows for TensorBoard: {error.strerror or error}. The last checkpoint, if any, is kept; "
        "--resume auto goes on there."
    )
