"""Where a run computes, and in which precision."""

from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from zoo.errors import RecipeError, reason

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """An accelerator of this precision, whatever an earlier run in this process had.

    Args:
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        **options: Of :class:`accelerate.Accelerator`.

    Raises:
        RecipeError: If this machine cannot compute in it, or accelerate is set to share the model out.
    """
    AcceleratorState._reset_state()  # accelerate keeps one precision per process; the process group stays
    try:
        accelerator = Accelerator(mixed_precision=_PRECISION[precision], **options)
    except ValueError as error:
        AcceleratorState._reset_state()
        raise RecipeError(f"train.precision is {precision!r}, which does not work here: {reason(error)}.") from error
    if accelerator.distributed_type in _SHARDED:
        raise RecipeError(
            f"accelerate is set to {accelerator.distributed_type.value}; zoo's checkpoints hold whole models so far, "
            "expected DDP (`accelerate config`, or torchrun)."
        )
    return accelerator
