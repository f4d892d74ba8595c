"""Where a run computes, and in which precision."""

import logging
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from zoo.deploy.program import DTYPES
from zoo.errors import RecipeError, reason
from zoo.train.sharding import check, launched, plugins

_logger = logging.getLogger(__name__)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def make_accelerator(precision: str, *, sharding: str = "", offload: bool = False, **options: Any) -> Accelerator:
    """An accelerator of this precision, whatever an earlier run in this process had.

    Args:
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        sharding: How processes share the model out, as :func:`~zoo.train.sharding.plugins` takes it; one process has
            nobody to share it with, and says so.
        offload: With sharding: keep what is not computed with in the host's memory.
        **options: Of :class:`accelerate.Accelerator`.

    Raises:
        RecipeError: If this machine cannot compute in it, or accelerate is set to something that zoo cannot
            save.
    """
    if sharding and launched() == 1:
        sharding = ""
        _logger.warning("train.sharding has no effect with one process")
    options |= plugins(sharding, offload=offload)
    AcceleratorState._reset_state()  # accelerate keeps one precision per process; the process group stays
    try:
        accelerator = Accelerator(mixed_precision=_PRECISION[precision], **options)
    except ValueError as error:
        AcceleratorState._reset_state()
        raise RecipeError(f"train.precision is {precision!r}, which does not work here: {reason(error)}.") from error
    check(accelerator, sharding)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and precision != "fp32":
        # Accelerate leaves it to DeepSpeed, which knows of the passes in training alone.
        autocast = partial(torch.autocast, accelerator.device.type, DTYPES[precision])
        accelerator.autocast = autocast  # type: ignore[method-assign]
    return accelerator
