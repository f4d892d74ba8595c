"""Where a run computes, and in which precision."""

import logging
import os
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from zoo.errors import RecipeError, reason
from zoo.train.sharding import check, plugins

_logger = logging.getLogger(__name__)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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
    # Not PartialState(), which, asked too early, takes a CPU's process for alone.
    if sharding and int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
    return accelerator
