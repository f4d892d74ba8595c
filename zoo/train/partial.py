"""Training a part of a model: its classifier, or low-rank adapters by peft."""

import copy
from typing import Any

from torch import nn

from zoo.errors import RecipeError, require
from zoo.registry import config_of, family_of
from zoo.train.recipe import Lora


def only_head(model: Any) -> None:
    """Train nothing but the classifier's linear layers, in place."""
    model.requires_grad_(False)
    for parameter in _head(model).values():
        parameter.requires_grad_(True)


def with_adapters(model: Any, lora: Lora) -> None:
    """Put low-rank adapters beside every linear layer and ungrouped 1 x 1 convolution, in place, and freeze the rest.

    The classifier has none: it is trained whole.

    Raises:
        MissingExtraError: If peft is not installed.
        RecipeError: If the model has no such layer.
    """
    peft = require("peft", extra="peft", why="train.tune='lora'")
    head = _head_prefixes(model)
    names = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_pointwise(module)) and not f"{name}.".startswith(head)
    ]
    if not names:
        raise RecipeError("train.tune is 'lora', but the model has no linear layer or 1 x 1 convolution.")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none"
    )
    peft.inject_adapter_in_model(config, model)
    for parameter in _head(model).values():
        parameter.requires_grad_(True)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model as it was built: itself, or a copy in which adapters are added to the weights they stand beside."""
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge()
            merged.set_submodule(name, layer.base_layer)
    return merged


def batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set what share of a batch goes into the running statistics, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _head_prefixes(model: Any) -> tuple[str, ...]:
    """How the names of the classifier's parameters begin."""
    return tuple(f"{prefix}." for prefix in family_of(config_of(model)).classifiers if prefix)


def _head(model: Any) -> dict[str, nn.Parameter]:
    prefixes = _head_prefixes(model)
    found = {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}
    if not found:
        raise RecipeError("The model has no classifier to train; expected train.tune='all'.")
    return found
