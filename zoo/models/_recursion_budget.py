"""How much computation a Mixture-of-Recursions model spends: thresholds from held-out text, or from a budget."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.families.mixture_of_recursions import MixtureOfRecursionsConfig


def budget_shares(shares: tuple[float, ...], budget: float) -> tuple[float, ...]:
    """Capacities whose mean is a budget: powers of the given ones, so that their order stays.

    Args:
        shares: The config's capacities.
        budget: Share of the recursions that tokens take on average, up to 1.

    Raises:
        ConfigError: If no power gives this mean.
    """
    lowest = sum(share == 1.0 for share in shares) / len(shares)
    if not lowest < budget <= 1.0:
        raise ConfigError(
            f"The compute budget is {budget:g}; expected more than {lowest:.3g}, as {lowest * len(shares):.0f} of "
            f"{len(shares)} recursions take every token, and at most 1."
        )
    low, high = 0.0, 1.0
    while sum(share**high for share in shares) / len(shares) > budget:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        above = sum(share**middle for share in shares) / len(shares) > budget
        low, high = (middle, high) if above else (low, middle)
    return tuple(share**high for share in shares)


@torch.no_grad()
def calibrate(model: Any, tokens: Tensor, budget: float | None = None) -> float:
    """Move the thresholds so that held-out text takes as much computation as training did, or as a budget says.

    The quantiles of the routers' probabilities become part of the config, so that :func:`set_compute_budget` needs no
    text later.

    Args:
        model: The transformers model.
        tokens: Held-out text, ``[B, T]``.
        budget: Share of the recursions that tokens take on average; None for the config's capacities.

    Returns:
        The mean depth of this text then, in recursions.

    Raises:
        ConfigError: If the model has no router, or the budget cannot be had.
    """
    trunk, config = model.model, model.model.arch
    if config.router == "none":
        raise ConfigError("A recursive model without a router takes every recursion; there is nothing to calibrate.")
    was_training = model.training
    model.eval()
    if config.router == "token":
        goal = config.num_recursions * (budget if budget is not None else (1 + 1 / config.num_recursions) / 2)
        _check_token_budget(goal / config.num_recursions, config.num_recursions)
        trunk.arch = config.override(depth_bias=0.0)
        low, high = -50.0, 50.0
        scores = _router_logits(model, tokens)[0]
        for _ in range(50):
            trunk.arch = config.override(depth_bias=(low + high) / 2 or 1e-9)
            above = float(trunk.chosen_depth(scores).double().mean()) + 1 > goal
            low, high = (low, trunk.arch.depth_bias) if above else (trunk.arch.depth_bias, high)
        _adopt(model, trunk.arch)
    else:
        shares = config.shares if budget is None else budget_shares(config.shares, budget)
        thresholds, quantiles = [1.0] * config.num_recursions, []
        before = 1.0
        for recursion, share in enumerate(shares):
            trunk.arch = config.override(thresholds=tuple(thresholds))
            logits = _router_logits(model, tokens)
            arrived = logits[recursion].flatten().double().sigmoid() if len(logits) > recursion else torch.ones(1)
            quantiles.append(tuple(arrived.quantile(torch.linspace(0, 1, 65).to(arrived)).tolist()))
            kept = round(share / before * len(arrived))
            thresholds[recursion] = 0.0 if share == before else _kth_largest(arrived, kept)
            before = share
        _adopt(model, config.override(thresholds=tuple(thresholds), router_quantiles=tuple(quantiles)))
    trunk.reset_mean_depth()
    model(tokens)
    depth = trunk.mean_depth
    trunk.reset_mean_depth()
    model.train(was_training)
    return depth


def _kth_largest(values: Tensor, k: int) -> float:
    """Between the k-th and the next, so that rounding moves no value across."""
    ordered = values.sort(descending=True).values
    if k <= 0:
        return 1.0
    return float(ordered[k - 1] if k >= len(ordered) else (ordered[k - 1] + ordered[k]) / 2)


def _router_logits(model: Any, tokens: Tensor) -> list[Tensor]:
    model(tokens, use_cache=False)
    return model.model.last.logits


def _adopt(model: Any, config: "MixtureOfRecursionsConfig") -> None:
    """Make this the model's config, in both of its forms."""
    model.model.arch = config
    for name in ("thresholds", "depth_bias", "router_quantiles"):
        setattr(model.config, name, getattr(config, name))


def _check_token_budget(budget: float, repeats: int) -> None:
    if not 1 / repeats <= budget <= 1:
        raise ConfigError(f"The compute budget is {budget:g}; expected {1 / repeats:.3g} to 1.")


def set_compute_budget(model: Any, budget: float, tokens: Tensor | None = None) -> None:
    """Trade quality for speed: move the thresholds so that tokens take this share of the recursions on average.

    Args:
        model: The transformers model.
        budget: For example 0.6.
        tokens: Text to calibrate on, ``[B, T]``; None to go by what an earlier :func:`calibrate` found, which token
            choice cannot.

    Raises:
        ConfigError: If the budget cannot be had, or there is neither text nor an earlier calibration of expert choice.
    """
    if not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ConfigError(f"The compute budget is {budget!r}; expected a share of the recursions, up to 1.")
    config = model.model.arch
    if tokens is not None or config.router == "none":
        calibrate(model, tokens, budget)  # type: ignore[arg-type]
        return
    if config.router == "token":
        raise ConfigError(
            "Token choice is calibrated for one budget at a time; expected tokens of held-out text beside it."
        )
    if not config.router_quantiles:
        raise ConfigError("This model was not calibrated; expected tokens of held-out text beside the budget.")
    thresholds, before = [], 1.0
    for share, quantiles in zip(budget_shares(config.shares, budget), config.router_quantiles, strict=True):
        place = (1 - share / before) * (len(quantiles) - 1)
        below = min(int(place), len(quantiles) - 2)
        value = quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])
        thresholds.append(0.0 if share == before else min(max(value, 1e-12), 1.0))
        before = share
    _adopt(model, config.override(thresholds=tuple(thresholds)))
