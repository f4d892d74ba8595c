"""Models that processes share out among themselves, by FSDP2 through accelerate: what a checkpoint needs of them.

Checkpoints hold whole tensors, so that a run goes on with another number of processes, sharded or not. What gathers
here must be called by all processes at once; torch does the communication.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.errors import RecipeError

_UNIT = 1_000_000  # parameters from which on a module is gathered by itself, where a model does not name its blocks


def plugins(sharding: str, *, offload: bool = False) -> dict[str, Any]:
    """The options of :class:`accelerate.Accelerator` that share a model out as a recipe says.

    Args:
        sharding: ``"fsdp2"``, or empty to leave it to ``accelerate config``, which may have said nothing.
        offload: Keep parameters and the optimiser's state in the host's memory.
    """
    if not sharding:
        return {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="size_based_wrap",
        min_num_params=_UNIT,
        cpu_offload=offload,
        cpu_ram_efficient_loading=False,  # each process makes or reads the weights, as without sharding
    )
    return {"fsdp_plugin": plugin}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only its part of the model."""
    return accelerator.distributed_type == DistributedType.FSDP


def check(accelerator: Accelerator, sharding: str = "") -> None:
    """Refuse what accelerate can be set to and zoo cannot keep in a checkpoint, and what a recipe asks for in vain.

    Raises:
        RecipeError: For FSDP's first version, DeepSpeed and Megatron-LM, and for sharding on CPUs.
    """
    kind = accelerator.distributed_type
    if sharding and not is_sharded(accelerator):
        raise RecipeError(
            f"train.sharding is {sharding!r}, which accelerate does on GPUs and their like alone; expected '' on "
            f"{accelerator.device.type!r}."
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("accelerate is set to FSDP 1; expected fsdp_version: 2 (`accelerate to-fsdp2` converts it).")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RecipeError(
            f"accelerate is set to {kind.value}; zoo's checkpoints hold no such state so far, expected DDP or FSDP2 "
            "(`accelerate config`, torchrun, or train.sharding='fsdp2')."
        )


def share_out(accelerator: Accelerator, model: nn.Module) -> None:
    """Share out a second model, one that is not trained, in place, as the trained one was."""
    if is_sharded(accelerator):
        fsdp2_prepare_model(accelerator, model)


def share_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the first one's buffers, such as batch norms' statistics, each of which saw its own samples.

    So that what is evaluated, averaged and gone on with is what is saved.
    """
    if accelerator.num_processes == 1:
        return
    kept = model.state_dict()  # not tables that are made anew with every model
    buffers = [each for name, each in model.named_buffers() if name in kept and each.is_floating_point()]
    if not buffers:
        return
    together = broadcast(torch.cat([each.flatten() for each in buffers]))
    for buffer, values in zip(buffers, together.split([each.numel() for each in buffers]), strict=True):  # type: ignore[union-attr]
        buffer.copy_(values.view_as(buffer))


def whole(tensor: Any) -> Any:
    """A tensor in one piece, gathered into the host's memory where it is shared out; anything else as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor as the reference is held: this process's part of it where that is shared out.

    It lies in memory as the reference does, so that the arithmetic is the uninterrupted run's to the last bit.
    """
    if isinstance(reference, DTensor):
        here = tensor.to(reference.device)
        # No process is the source: each has the whole tensor, and nothing is sent.
        return distribute_tensor(here, reference.device_mesh, reference.placements, src_data_rank=None)
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
