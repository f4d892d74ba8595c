"""Checkpoints: one safetensors file with everything that resuming needs, so that one rename makes it current.

Tensors are ``model.*``, ``ema.*``, ``sampler.*`` and ``optimizer.<parameter index>.<name>``; the header's metadata has
the progress and the numbers of the optimiser's parameter groups as JSON. No pickle is written or read.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo.atomic import save_safetensors
from zoo.errors import TrainingError, WeightsError
from zoo.train.sharding import Sharing

_ALONE = Sharing()


def save_checkpoint(
    path: Path,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    sampler: dict[str, Tensor],
    *,
    sharing: Sharing = _ALONE,
    writes: bool = True,
) -> None:
    """Write atomically: after a kill at any instant, ``path`` is the previous checkpoint or this one.

    Args:
        path: The file.
        model, ema, optimizer: What is trained, its average if there is one, and by what.
        progress: Whatever else resuming needs, as JSON takes it.
        sampler: The sampler's tensors, by name.
        sharing: How processes share the model.
        writes: Whether this process is the one that writes. Where the model is shared out, the others must call this
            too, so that theirs is gathered.

    Raises:
        TrainingError: If it cannot be written (a full disk); the previous checkpoint is kept.
    """
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, state: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in state:
            if writes:
                tensors[f"{prefix}.{name}"] = tensor

    add("model", sharing.state(model))
    if ema is not None:
        add("ema", sharing.state(ema))
    add("optimizer", sharing.optimizer_state(optimizer))
    add("sampler", sampler.items())
    # Some optimisers count in their groups.
    groups = [
        {name: value for name, value in group.items() if isinstance(value, int | float)}
        for group in optimizer.param_groups
    ]
    if writes:
        write(path, tensors, {"zoo_progress": json.dumps(progress), "zoo_groups": json.dumps(groups)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        TrainingError: If it cannot be written; what was there before is kept.
    """
    try:
        save_safetensors(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(f"Cannot write {path}: {reason}. The previous checkpoint, if any, is kept.") from error


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    *,
    sharing: Sharing = _ALONE,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model, average and optimiser in place; return the progress and the sampler's tensors.

    Raises:
        WeightsError: If the file is damaged or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            progress, saved_groups = json.loads(metadata["zoo_progress"]), json.loads(metadata["zoo_groups"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is not a training checkpoint of zoo, or is damaged: {error}.") from error
    try:
        sharing.load_state(model, _part(tensors, "model."))
        if ema is not None:
            sharing.load_state(ema, _part(tensors, "ema."))
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit this run's model: {str(error).splitlines()[-1].strip()}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _part(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    sharing.load_optimizer_state(optimizer, state)
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update(saved)
    return progress, _part(tensors, "sampler.")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
