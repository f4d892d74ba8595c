"""How processes share a model out among themselves, through accelerate: not at all, by FSDP2, or by DeepSpeed's ZeRO.

Checkpoints hold whole tensors, so that a run goes on with another number of processes, however they share. What gathers
here must be called by all processes at once; torch, accelerate and DeepSpeed do the communication.
"""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast,
    fsdp2_prepare_model,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.errors import RecipeError, require
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    from timm.utils.model_ema import ModelEmaV3

_UNIT = 1_000_000  # parameters from which on a module is gathered by itself, where a model does not name its blocks
_BUCKET = 500_000_000  # values that DeepSpeed reduces at once, unless the model has fewer: its own default


class Sharing:
    """Each process holds the whole model, as one alone and DDP do; the subclasses say what differs for others.

    Attributes:
        splits: Whether a process holds only its part of the model, so that all must run it together.
        relays: Whether parameters are laid out anew, so that another order of memory than theirs is lost.
        clips: Whether gradients are clipped, by norm, within the step; their norm is known after it.
    """

    splits = False
    relays = False
    clips = False

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, micro: int
    ) -> tuple[Any, Any]:
        """Model and optimiser, ready to train on passes of ``micro`` samples per process.

        Raises:
            RecipeError: If the recipe asks for what this way of sharing cannot do.
        """
        return accelerator.prepare(model, optimizer)

    def share_out(self, average: "ModelEmaV3") -> None:
        """Share out the average, in place, as the trained model was."""

    def update(self, average: "ModelEmaV3", model: nn.Module, step: int) -> None:
        """Let the model's weights after a step into the average."""
        average.update(model, step=step)

    def held(self, model: nn.Module) -> list[Tensor]:
        """What of a model's tensors lies in this process."""
        return [each.to_local() if isinstance(each, DTensor) else each for each in model.state_dict().values()]

    def state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """A model's tensors by name, each in one piece."""
        for name, tensor in model.state_dict().items():
            yield name, whole(tensor)

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take over whole tensors.

        Raises:
            RuntimeError: If they are not the model's.
        """
        held = model.state_dict()
        fitting = {
            name: _part_like(tensor, held[name]) if name in held and tensor.shape == held[name].shape else tensor
            for name, tensor in state.items()
        }
        model.load_state_dict(fitting)  # and this raises for what does not fit

    def optimizer_state(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """What the optimiser knows of each parameter, in one piece, as ``<parameter index>.<name>``."""
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                yield f"{index}.{name}", torch.as_tensor(whole(value))

    def load_optimizer_state(self, optimizer: Any, state: dict[int, dict[str, Tensor]]) -> None:
        """Take over what :meth:`optimizer_state` gave, by parameter index and name. The model's tensors come first."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {
            index: {
                name: _part_like(tensor, parameters[index]) if tensor.shape == parameters[index].shape else tensor
                for name, tensor in tensors.items()
            }
            for index, tensors in state.items()
        }
        optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})


class Fsdp2(Sharing):
    """Parameters, gradients and the optimiser's state are shared out as distributed tensors."""

    splits = relays = True  # it takes contiguous parameters alone

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def share_out(self, average: "ModelEmaV3") -> None:
        fsdp2_prepare_model(self._accelerator, average.module)
        # Which takes no mixture of parameters that are shared out and buffers that are not.
        average.foreach = False


class Zero(Sharing):
    """ZeRO 1 and 2: the optimiser's state, and from stage 2 on the gradients, are shared out; the model is not.

    Every group of parameters is one flat tensor, of which a process updates its part.
    """

    relays = clips = True

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, micro: int
    ) -> tuple[Any, Any]:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # Whoever chose it, `accelerate config` or the recipe: the recipe's checks apply.
        recipe.replace(**{"train.sharding": f"zero{config['zero_optimization']['stage']}"})
        config.update(
            train_batch_size=recipe.train.batch_size,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
            gradient_clipping=recipe.optim.clip,
            # Its own mixed precision would round weights, batch statistics and averages.
            bf16={"enabled": False},
            torch_autocast={"enabled": recipe.train.precision == "bf16", "dtype": "bfloat16"},
            zero_force_ds_cpu_optimizer=False,  # the recipe's optimiser, not DeepSpeed's Adam with its own settings
        )
        size = sum(parameter.numel() for parameter in model.parameters())
        config["zero_optimization"].setdefault("reduce_bucket_size", min(size, _BUCKET))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._indices = {parameter: index for index, parameter in enumerate(parameters)}
        self._accelerator = accelerator
        return accelerator.prepare(model, optimizer)

    def optimizer_state(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link(optimizer)
        for flat, parameters in self._groups(optimizer):
            for parameter in parameters:
                for name, value in optimizer.optimizer.state[flat].items():
                    if name != "step":
                        value = safe_get_full_optimizer_state(parameter, name)
                    # A copy: the count is the flat tensor's, that is of several parameters.
                    yield f"{self._indices[parameter]}.{name}", torch.as_tensor(value).to("cpu", copy=True)

    def load_optimizer_state(self, optimizer: Any, state: dict[int, dict[str, Tensor]]) -> None:
        for flat, parameters in self._groups(optimizer):
            for parameter in parameters:
                self._refresh(parameter)
            # What torch's optimisers make in their first step, which is done already.
            known = state.get(self._indices[parameters[0]], {})
            on_device = optimizer.optimizer.defaults.get("fused") or optimizer.optimizer.defaults.get("capturable")
            optimizer.optimizer.state[flat] = {
                name: value.to(flat.device if on_device else "cpu") if name == "step" else torch.zeros_like(flat)
                for name, value in known.items()
            }
        self._link(optimizer)
        for parameter, index in self._indices.items():
            for name, value in state.get(index, {}).items():
                if name != "step":
                    self._set(parameter, value, name)

    def _groups(self, optimizer: Any) -> Iterable[tuple[Tensor, list[nn.Parameter]]]:
        """This process's part of each flat tensor, and the parameters in it."""
        return zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)

    def _link(self, optimizer: Any) -> None:
        """Let parameters know of their state: DeepSpeed does so when only the first group has some."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, parameters in self._groups(optimizer):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)

    def _refresh(self, parameter: nn.Parameter) -> None:
        """Take the parameter's values over into the flat tensor, which is a copy."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.data)

    def _set(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        """Take over a whole tensor of the optimiser's state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, name)


class Zero3(Zero):
    """ZeRO 3: the parameters are shared out too, each by itself, the last process's part filled up with zeros.

    Parts are read and written where they lie: what DeepSpeed gathers may be rounded to the precision of the passes.
    """

    splits = True

    def share_out(self, average: "ModelEmaV3") -> None:
        import deepspeed

        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        # In full precision, and no parameter stays whole, as it would not learn of updates.
        zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
        config = config | {"zero_optimization": zero, "torch_autocast": {"enabled": False}}
        self._average = deepspeed.initialize(model=average.module, config=config)[0]

    def update(self, average: "ModelEmaV3", model: nn.Module, step: int) -> None:
        self._average.empty_partition_cache()
        weight = 1 - average.get_decay(step)
        for mine, theirs in zip(self.held(average.module), self.held(model), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, weight)
            else:
                mine.copy_(theirs)

    def held(self, model: nn.Module) -> list[Tensor]:
        return [getattr(each, "ds_tensor", each).detach() for each in model.state_dict(keep_vars=True).values()]

    def state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if hasattr(tensor, "ds_tensor"):
                parts = self._accelerator.gather(tensor.ds_tensor.detach().to(self._accelerator.device))
                yield name, parts[: tensor.ds_numel].view(tensor.ds_shape).cpu()
            else:
                yield name, tensor.detach().cpu()

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        held = model.state_dict(keep_vars=True)
        if {name: each.shape for name, each in state.items()} != {
            name: getattr(each, "ds_shape", each.shape) for name, each in held.items()
        }:
            raise RuntimeError("tensors have other names or shapes.")
        for name, tensor in held.items():
            if hasattr(tensor, "ds_tensor"):
                tensor.ds_tensor.copy_(self._part(tensor, state[name]))
            if tensor.shape == state[name].shape:  # a buffer, or a parameter so small that it stays whole
                tensor.data.copy_(state[name])

    def _groups(self, optimizer: Any) -> Iterable[tuple[Tensor, list[nn.Parameter]]]:
        return zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)

    def _link(self, optimizer: Any) -> None:
        """Nothing to do: parameters find their state by their place."""

    def _refresh(self, parameter: Any) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, parameter.ds_tensor)

    def _set(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, self._part(parameter, value), name)

    def _part(self, parameter: Any, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor of a parameter's shape."""
        size = parameter.ds_tensor.numel()
        filled = F.pad(tensor.flatten(), (0, size * self._accelerator.num_processes - tensor.numel()))
        return filled.narrow(0, size * self._accelerator.process_index, size)


def plugins(sharding: str, *, offload: bool = False) -> dict[str, Any]:
    """The options of :class:`accelerate.Accelerator` that share a model out as a recipe says.

    Args:
        sharding: ``"fsdp2"``, ``"zero1"`` to ``"zero3"``, or empty to leave it to ``accelerate config``, which may have
            said nothing.
        offload: Keep the optimiser's state, and what of the parameters is shared out, in the host's memory.

    Raises:
        MissingExtraError: If DeepSpeed is wanted and not installed.
    """
    if not sharding:
        return {}
    if sharding.startswith("zero"):
        require("deepspeed", extra="deepspeed", why=f"train.sharding={sharding!r}")
        stage, host = int(sharding[-1]), "cpu" if offload else "none"
        plugin = DeepSpeedPlugin(
            zero_stage=stage,
            offload_optimizer_device=host,
            offload_param_device=host if stage == 3 else "none",
            zero3_init_flag=False,  # each process makes or reads the weights, as without sharding
        )
        return {"deepspeed_plugin": plugin}
    return {
        "fsdp_plugin": FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="size_based_wrap",
            min_num_params=_UNIT,
            cpu_offload=offload,
            cpu_ram_efficient_loading=False,  # each process makes or reads the weights, as without sharding
        )
    }


def launched() -> int:
    """Processes that a launcher started, by its own word: PartialState(), asked too early, takes a CPU's for alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check(accelerator: Accelerator, sharding: str = "") -> None:
    """Refuse what accelerate can be set to and zoo cannot keep in a checkpoint, and what a recipe asks for in vain.

    Raises:
        RecipeError: For FSDP's first version, Megatron-LM, DeepSpeed without ZeRO, with an optimiser of its own or on
            disks, and for sharding on CPUs.
    """
    kind = accelerator.distributed_type
    asked = f"train.sharding is {sharding!r}" if sharding else f"accelerate is set to {kind.value}"
    left = sharding and kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if left or (kind == DistributedType.DEEPSPEED and accelerator.num_processes != launched()):
        raise RecipeError(
            f"{asked}, which accelerate does on GPUs and their like alone; expected '' on {accelerator.device.type!r}."
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("accelerate is set to FSDP 1; expected fsdp_version: 2 (`accelerate to-fsdp2` converts it).")
    if kind == DistributedType.MEGATRON_LM:
        raise RecipeError(
            "accelerate is set to MEGATRON_LM; zoo's checkpoints hold no such state so far, expected DDP, FSDP2 or "
            "DeepSpeed (`accelerate config`, torchrun, or train.sharding)."
        )
    if kind == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config["zero_optimization"]
        hosts = [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]
        wrong = {
            f"zero_optimization.stage {zero['stage']}, expected 1, 2 or 3": zero["stage"] not in (1, 2, 3),
            "offloading to nvme, expected cpu": "nvme" in hosts,
            "an optimizer, which is the recipe's": "optimizer" in config,
            "a scheduler, which is the recipe's": "scheduler" in config,
        }
        for what, holds in wrong.items():
            if holds:
                raise RecipeError(f"DeepSpeed's configuration has {what}.")


def sharing_of(accelerator: Accelerator) -> Sharing:
    """How an accelerator that :func:`check` let pass has processes share models."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return Fsdp2(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return Zero3() if stage == 3 else Zero()
    return Sharing()


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


def _part_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor as the reference is held: this process's part of it where that is shared out.

    It lies in memory as the reference does, so that the arithmetic is the uninterrupted run's to the last bit.
    """
    if isinstance(reference, DTensor):
        here = tensor.to(reference.device)
        # No process is the source: each has the whole tensor, and nothing is sent.
        return distribute_tensor(here, reference.device_mesh, reference.placements, src_data_rank=None)
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)
