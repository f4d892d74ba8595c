"""From a file to tensors, from tensors into a model.

Every file is safetensors: reading one runs no code. A pickle is recognised by its content and refused.
"""

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.errors import WeightsError, reason
from zoo.layers.bit_linear import PackedBitLinear
from zoo.layers.init import reset_parameters
from zoo.pretrained.files import is_remembered, read_header, remember
from zoo.pretrained.mapped import map_tensors
from zoo.registry import Family

_logger = logging.getLogger(__name__)


def load_state_dict(path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on ``device``.

    Args:
        path: The file.
        device: Where the tensors are to be.
        mapped: Map what can be mapped into memory instead of reading it; that the file passed the checks is remembered
            while it stays as it is. On the CPU only, and only for files that nobody writes to, such as those of a
            cache: the tensors would change with the file, or crash when it is cut short.

    Raises:
        WeightsError: If there is no such file, or it is damaged, or it is not safetensors, or not all of it is finite
            numbers; for a pickle, says how to convert it.
    """
    path = Path(path)
    if is_pickle(path):
        raise WeightsError(
            f"{path}: a pickle, which can run any code when it is read; expected safetensors. If you trust where it "
            "comes from, convert it once: zoo weights convert MODEL --source FILE --out FILE.safetensors"
        )
    mapped = mapped and torch.device(device).type == "cpu"
    fact = f"sound-{hashlib.sha256(str(path).encode()).hexdigest()}"
    known = mapped and is_remembered(fact, path)
    header = read_header(path)  # of two tensors with one name, safetensors takes the last
    try:
        if mapped and not known:
            with safe_open(path, framework="pt"):
                pass  # it has checked that the tensors are as large as they should be and fill the file, one by one
        state = map_tensors(path, header) if mapped else load_file(path, device=str(device), backend="pread")
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file, perhaps a download cut short ({reason(error)})."
        ) from error
    if not known:
        check_finite(state, path)
    if mapped and not known:
        remember(fact, path)
    return state


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise when a tensor holds what is no number.

    Raises:
        WeightsError: Names the first such tensor.
    """
    for name, tensor in state.items():
        # NaN and infinity go through a sum; numbers may add up to infinity, so each is looked at then.
        suspect = tensor.is_floating_point() and tensor.numel() and not math.isfinite(_sum(tensor))
        if suspect and not tensor.double().isfinite().all():
            raise WeightsError(f"{path}: {name} holds values that are NaN or infinite; the training diverged.")


def _sum(tensor: Tensor) -> float:
    """The sum, on the CPU by numpy: torch would wake its threads for every tensor, which costs more than adding."""
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        with np.errstate(all="ignore"):
            return float(tensor.numpy().sum())
    return float(tensor.float().sum())


def is_pickle(path: Path) -> bool:
    """Whether a file's content is a pickle, or the zip around one that ``torch.save`` writes.

    Raises:
        WeightsError: If there is no such file, or it is empty.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a safetensors file.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}.") from error
    if not start:
        raise WeightsError(f"{path}: an empty file; expected safetensors.")
    if start[8:] == b"{":  # safetensors: the header's length in 8 bytes, then the header, a JSON object
        return False
    return start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] <= b"\x05")


def fit_state_dict(model: nn.Module, state: Mapping[str, Tensor], family: Family, *, assign: bool = False) -> None:
    """Load ``state`` into ``model``, adapting what may differ between the two.

    - Floating point tensors take the model's dtype.
    - A classifier with another number of classes is initialised anew, with a warning in the log; for a model without
      a classifier it is left out.
    - An input convolution with another number of channels is summed (to one channel) or repeated, as timm does it.
    - What a layer adapts itself, as attention biases do, it does.

    Args:
        model: A model of this family.
        state: Tensors by zoo's parameter names.
        family: Names the input convolution and the classifier.
        assign: Whether the model takes the tensors over as they are, as one on the meta device must; otherwise it keeps
            its own and copies the values.

    Raises:
        WeightsError: If anything else is missing, left over or of another shape; names the keys.
    """
    example = next(model.parameters())
    places = _places(model)
    packed = any(name.endswith(".packed") for name in places)
    modules = model.named_modules() if packed else ()
    scales = {f"{name}.scale" for name, layer in modules if isinstance(layer, PackedBitLinear)}
    dtype = example.dtype
    state = {
        name: tensor
        if tensor.dtype is dtype or not tensor.dtype.is_floating_point or name in scales
        else tensor.to(dtype)
        for name, tensor in state.items()
    }
    _fit_input(model, state, family.first_conv)
    for classifier in family.classifiers:
        _fit_classifier(model, state, classifier)
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():  # of which transformers saves one
        if target not in state and origin in state:
            state[target] = state[origin]
    others = [name for name, tensor in state.items() if not tensor.dtype.is_floating_point]
    if others := [name for name in others if name in places and places[name].is_parameter]:
        raise WeightsError(f"{listed(others)}: {state[others[0]].dtype}, expected {dtype}.")
    try:
        fits = assign and _assign(places, state)
        result = None if fits else model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:  # shapes that differ; it lists them all
        misfits = re.findall(r"size mismatch for ([^:]+):", str(error))
        if not misfits:
            raise
        problem = f"{listed(misfits)} of another shape"
    else:
        if result is None or not (result.missing_keys or result.unexpected_keys):
            if getattr(model, "all_tied_weights_keys", None):
                model.tie_weights()  # type: ignore[operator]
            return
        problem = f"{listed(result.unexpected_keys)} unused, {listed(result.missing_keys)} missing"
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or family.title
    raise WeightsError(f"Checkpoint does not fit {name}: {problem}.")


class _Place(NamedTuple):
    """Where an entry of the state dict belongs."""

    table: dict[str, Any]  # of a module's parameters or buffers
    key: str
    is_parameter: bool


def walk(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Every module with the start of its entries' names; ``named_modules`` takes three times as long."""
    found = [(prefix, module)]
    for name, child in module._modules.items():
        if child is not None:
            found += walk(child, f"{prefix}{name}.")
    return found


def _places(model: nn.Module) -> dict[str, _Place]:
    """The entries of a model's state dict, without the tensors."""
    places: dict[str, _Place] = {}
    for prefix, module in walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places[prefix + key] = _Place(module._parameters, key, True)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                places[prefix + key] = _Place(module._buffers, key, False)
    return places


def _assign(places: Mapping[str, _Place], state: Mapping[str, Tensor]) -> bool:
    """Put tensors in the places of a model's own, where there is one of its shape for each and none is left over.

    ``load_state_dict(assign=True)`` comes to the same and takes five times as long, more than all the rest of loading.

    Returns:
        Whether that is so; if not, nothing is changed.
    """
    if places.keys() != state.keys():
        return False
    if any(table[key].shape != state[name].shape for name, (table, key, _) in places.items()):
        return False
    for name, (table, key, is_parameter) in places.items():
        tensor = state[name]
        table[key] = nn.Parameter(tensor, requires_grad=table[key].requires_grad) if is_parameter else tensor
    return True


def _fit_input(model: nn.Module, state: dict[str, Tensor], first_conv: str) -> None:
    name = f"{first_conv}.weight"
    if not first_conv or name not in state:
        return
    own, weight = model.get_parameter(name), state[name]
    if own.ndim == weight.ndim == 4 and own.shape[1] != weight.shape[1]:
        state[name] = adapt_input_channels(weight, own.shape[1])
        _logger.info("%s adapted from %d to %d channels", name, weight.shape[1], own.shape[1])


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight for another number of input channels, by timm's rule.

    Summed to one channel; otherwise repeated in order, cut off, and scaled to keep the size of its output.

    Args:
        weight: ``[Cout, Cin, kH, kW]``.
        in_chans: The channels wanted.

    Returns:
        ``[Cout, in_chans, kH, kW]``.
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeats = -(-in_chans // channels)
    return weight.repeat(1, repeats, 1, 1)[:, :in_chans] * (channels / in_chans)


def _fit_classifier(model: nn.Module, state: dict[str, Tensor], classifier: str) -> None:
    """Replace a classifier for other classes by a fresh one; drop it for a model that has none."""
    key = f"{classifier}.weight"
    if key not in state:
        return
    root = classifier.partition(".")[0]  # the module that the classifier is, or is part of
    weight = state[key]
    try:
        own = model.get_parameter(key)
    except AttributeError:  # no classifier: what goes with it is left out too
        known = model.state_dict()
        for name in [name for name in state if name.startswith(f"{root}.") and name not in known]:
            del state[name]
        return
    if own.shape[0] == weight.shape[0] or own.shape[1:] != weight.shape[1:]:
        return
    fresh = deepcopy(model.get_submodule(root)).to_empty(device=weight.device)
    reset_parameters(fresh)
    for name, tensor in fresh.state_dict(prefix=f"{root}.").items():
        if name.startswith(f"{classifier}."):
            state[name] = tensor
    _logger.warning(
        "The file's classifier %s has %d classes, the model %d: initialised anew. num_classes=%d keeps it.",
        classifier,
        weight.shape[0],
        own.shape[0],
        weight.shape[0],
    )


def listed(names: Iterable[str]) -> str:
    """``"2 keys (head.fc.weight, head.fc.bias)"``: how many, and the first three."""
    names = list(names)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'key' if len(names) == 1 else 'keys'} ({shown})" if names else "0"
