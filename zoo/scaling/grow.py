"""Weights for a scaled network: carried over from the network it was scaled from, where shapes allow."""

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig, TextConfig
from zoo.errors import ConfigError
from zoo.factory import build, create_model
from zoo.pretrained.load import listed
from zoo.registry import config_of, family_of

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """Where each tensor of a grown model is from; every name is in one of these.

    Attributes:
        copied: As they were.
        repeated: In blocks that are new, those of the nearest block of the same stage.
        stretched: Of another width: channels repeated when there are more, the first ones when there are fewer.
        resampled: Tables of positions for another resolution.
        fresh: Newly initialised.
    """

    copied: tuple[str, ...]
    repeated: tuple[str, ...]
    stretched: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(names)} {kind}" for kind, names in vars(self).items() if kind != "fresh"]
        new = f"newly initialised: {listed(self.fresh)}" if self.fresh else "nothing newly initialised"
        return f"{', '.join(parts)} tensors; {new}."


@torch.no_grad()
def grow(source: str | ModelConfig | nn.Module, config: ModelConfig, *, noise: float = 0.01) -> Any:
    """A model of a scaled config that starts from the weights of another of its family.

    Wider layers are Net2Net's (arXiv:1511.05641): channels are repeated in turn, and what reads them is divided by how
    often each was, so that a network of convolutions and batch norms that is a whole number of times as wide computes
    the same. Blocks that are new start as the nearest block of their stage, as in progressive stacking (Gong et al.,
    ICML 2019). Fewer channels are the first ones.

    Args:
        source: A variant's name, whose pretrained weights are fetched, or a model that holds weights.
        config: Of the same family.
        noise: Standard deviation of what is added to repeated channels, relative to that of their weights, so that
            training can tell them apart.

    Returns:
        The model in training mode; its ``growth`` is the :class:`Growth`, which is also logged.

    Raises:
        ConfigError: If the source is of another family or holds no weights.
        WeightsError: If a name has no pretrained weights.
    """
    if isinstance(source, str):
        small: Any = create_model(source, pretrained=True)
    elif isinstance(source, nn.Module) and hasattr(source, "config"):
        small = source
    else:
        raise ConfigError(f"{type(source).__name__} holds no weights; expected a model, or the name of one.")
    if type(config_of(small)) is not type(config):
        ours, theirs = (family_of(each).title for each in (config, config_of(small)))
        raise ConfigError(f"The config is of {ours}, the weights are of {theirs}; expected one family.")
    model: Any = build(config)
    old, new = small.state_dict(), model.state_dict()
    by_pattern = _by_pattern(old)
    block_number = 0 if isinstance(config, TextConfig) else 1  # which of a name's numbers counts blocks
    found: dict[str, list[str]] = {kind: [] for kind in Growth.__dataclass_fields__}
    state: dict[str, Tensor] = {}
    for name, tensor in new.items():
        origin = _nearest(name, by_pattern, block_number)
        kind = "fresh"
        if origin is not None:
            value = old[origin]
            if value.shape == tensor.shape:
                kind, state[name] = ("copied" if origin == name else "repeated"), value
            elif name.endswith("attention_biases"):
                if value.shape[0] == tensor.shape[0] and math.isqrt(value.shape[1]) ** 2 == value.shape[1]:
                    kind, state[name] = "resampled", value  # by the layer, as it is loaded
            elif value.shape[2:] == tensor.shape[2:]:
                kind, state[name] = "stretched", _stretched(value, tensor, noise)
        found[kind].append(name)
    model.load_state_dict(state, strict=False)
    model.growth = Growth(**{kind: tuple(names) for kind, names in found.items()})
    _logger.warning("%s", model.growth)
    return model


def _by_pattern(state: dict[str, Tensor]) -> dict[str, list[str]]:
    """Names by what they are once the numbers in them are left out."""
    found: dict[str, list[str]] = {}
    for name in state:
        found.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return found


def _nearest(name: str, by_pattern: dict[str, list[str]], block_number: int) -> str | None:
    """The name itself, or else one that differs in the number of its block alone, by as little as there is."""
    candidates = by_pattern.get(re.sub(r"\d+", "#", name), [])
    own = [int(number) for number in re.findall(r"\d+", name)]
    best: tuple[int, str] | None = None
    for candidate in candidates:
        numbers = [int(number) for number in re.findall(r"\d+", candidate)]
        differing = [i for i, (a, b) in enumerate(zip(own, numbers, strict=True)) if a != b]
        if differing not in ([], [block_number]):
            continue
        distance = abs(own[block_number] - numbers[block_number]) if differing else 0
        if best is None or distance < best[0]:
            best = (distance, candidate)
    return None if best is None else best[1]


def _stretched(value: Tensor, target: Tensor, noise: float) -> Tensor:
    """A tensor with its first two dimensions repeated or cut: weights are ``[out, in, ...]``, biases ``[out]``."""
    for dimension in range(min(2, value.ndim)):
        before, after = value.shape[dimension], target.shape[dimension]
        if before == after:
            continue
        index = torch.arange(after, device=value.device) % before
        value = value.index_select(dimension, index)
        if dimension == 1:
            times = torch.bincount(index, minlength=before)[index]
            value = value / times.view(1, -1, *[1] * (value.ndim - 2)).to(value.dtype)
        if after > before and noise and value.ndim > 1:
            added = torch.randn_like(value) * (noise * value.std())
            added.narrow(dimension, 0, before).zero_()  # the originals stay as they are
            value = value + added
    return value
