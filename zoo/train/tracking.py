"""The figures of every epoch in TensorBoard and Weights & Biases, through accelerate's trackers."""

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from zoo.errors import TrainingError, reason, require
from zoo.train.recipe import Recipe, Train
from zoo.train.run_folder import RunFolder, read_json


def require_trackers(train: Train) -> None:
    """Raise :class:`~zoo.errors.MissingExtraError` if a recipe names a tracker whose package is not installed."""
    if train.tensorboard:
        require("tensorboard", extra="train", why="train.tensorboard")
    if train.wandb:
        require("wandb", extra="wandb", why="train.wandb")


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: RunFolder) -> None:
    """Start what the recipe names, on the main process; both write into the run folder.

    Args:
        accelerator: Whose ``log`` they are to follow.
        recipe: Which trackers; Weights & Biases also keeps it as the run's config.
        folder: The run's; its manifest has the id under which a resumed run goes on as the same.

    Raises:
        TrainingError: If Weights & Biases cannot be logged in to or reached.
    """
    trackers: list[GeneralTracker] = []
    if recipe.train.tensorboard:
        trackers.append(TensorBoardTracker("tensorboard", folder.path))
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
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        raise TrainingError(
            f"Weights & Biases does not start: {reason(error)}. Run `wandb login`, or set WANDB_MODE=offline or "
            "train.wandb=''; then go on with --resume auto."
        ) from error
