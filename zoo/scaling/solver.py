"""``zoo.scale``: a rule and a budget in, a config out."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from torch import nn

from zoo.analysis.counts import Counts, count
from zoo.axes import Factors, check_factor, dimensions, resize
from zoo.config import ModelConfig
from zoo.errors import ConfigError, nearest
from zoo.families import MODULES
from zoo.registry import config_of, get_config, index
from zoo.scaling.rules import Rule, compound_base, get_rule, rules_for

TOLERANCE = 0.02  # relative error of a met target
_GOOD = 0.01  # where the search stops early
_SHORT_LIST = 3  # configs that are measured for a latency where others are only predicted
_STEPS = 8  # configs that one search costs out at most
_STRETCH = 0.1  # of its product, by which a single width may miss it so that the network meets its target
_MAX_FACTOR = 1e6
QUANTITIES = ("macs", "params", "activations", "latency_ms")


class ScalingWarning(UserWarning):
    """A target is missed by more than 2 %, since the family cannot be made finer."""


@dataclass(frozen=True)
class Fit:
    """What :func:`fit` found.

    Attributes:
        config: The scaled config.
        rule: The rule's name.
        factors: What was multiplied by, before rounding. Where width closed the gap that the rounding of depth and
            resolution had left, its factor is not quite the rule's.
        quantity: ``"factor"``, ``"macs"``, ``"params"``, ``"activations"`` or ``"latency_ms"``.
        target: The value asked for, in that quantity.
        achieved: The value counted or measured; of ``"factor"``, what the factors multiply to.
    """

    config: ModelConfig
    rule: str
    factors: Factors
    quantity: str
    target: float
    achieved: float

    @property
    def error(self) -> float:
        """Relative distance from the target; negative below it."""
        return self.achieved / self.target - 1

    @property
    def met(self) -> bool:
        """Whether the target is met to 2 %."""
        return abs(self.error) <= TOLERANCE

    @property
    def counts(self) -> Counts:
        """Parameters, MACs and activations of the config."""
        return counts_of(self.config)


def scale(
    model: str | ModelConfig | nn.Module, rule: str = "fast", *, weights: str | None = None, **target_and_options: Any
) -> Any:
    """A config scaled by a rule; :func:`fit` takes the same arguments and tells how well the target was met.

    Args:
        model: A variant's name, with a tag or not, or a config of any family; with ``weights="grow"``, a name or a
            model that holds weights.
        rule: One of ``zoo.scaling.RULES``, a letter for a single axis, or pycls' notation: ``"d1_w8_g8_r1"``.
        weights: ``"grow"`` builds the scaled model and carries the weights over (:func:`zoo.scaling.grow`).
        **target_and_options: A target and the rule's options, as of :func:`fit`.

    Returns:
        A config; with ``weights="grow"``, a model, whose ``growth`` says what was copied and what is new.

    Example:
        >>> config = zoo.scale("efficientnet_b0", rule="fast", alpha=0.8, flops=4.0)
        >>> model = zoo.build(config)

    Raises:
        ConfigError: As :func:`fit` does.

    Warns:
        ScalingWarning: If the nearest config misses the target by more than 2 %.
    """
    if weights not in (None, "grow"):
        raise ConfigError(f"weights is {weights!r}; expected 'grow' to carry weights over, or None for a config.")
    if isinstance(model, nn.Module) and weights is None:
        raise ConfigError("A model was given; expected a name or a config, or weights='grow' for its weights.")
    found = fit(config_of(model) if isinstance(model, nn.Module) else model, rule, **target_and_options)
    if found.quantity != "factor" and not found.met:
        warnings.warn(
            f"{found.quantity} {found.achieved:.4g} instead of {found.target:.4g} ({found.error:+.1%}): the nearest "
            f"that the rule {found.rule!r} reaches with this family's rounding.",
            ScalingWarning,
            stacklevel=2,
        )
    if weights is None:
        return found.config
    from zoo.scaling.grow import grow

    return grow(model, found.config)


def fit(
    model: str | ModelConfig,
    rule: str = "fast",
    *,
    factor: float | None = None,
    phi: float | None = None,
    flops: float | None = None,
    macs: float | str | None = None,
    params: float | str | None = None,
    activations: float | str | None = None,
    latency_ms: float | None = None,
    target: str = "cpu",
    depth: float | None = None,
    width: float | None = None,
    resolution: float | None = None,
    img_size: int | None = None,
    **options: float,
) -> Fit:
    """Scale a config by a rule until it meets a budget.

    Exactly one target is named: ``factor``, ``phi``, ``flops``, ``macs``, ``params``, ``activations``, ``latency_ms``,
    or multipliers of one's own: ``depth``, ``width``, ``resolution``.

    Args:
        model: A variant's name, or a config of any family.
        rule: One of ``zoo.scaling.RULES``, a letter for a single axis, or pycls' notation: ``"d1_w8_g8_r1"``.
        factor: The rule's own arithmetic and rounding for this cost, as its paper has it; nothing is searched for.
        phi: The same for the compound rule, in its own unit.
        flops: Counted MACs, as a multiple of the base's (what papers call FLOPs).
        macs: Counted MACs of one sample: a number, or a multiple of the base's such as ``"4x"``.
        params: Learnable parameters, likewise.
        activations: Elements written by convolutions and matrix products, likewise.
        latency_ms: Median milliseconds of a fused forward pass, batch 1, measured here and now; on a machine that
            ``zoo calibrate`` has seen, of a short list that its predictions make.
        target: The device to measure on, such as ``"cpu"`` or ``"cuda"``.
        depth, width, resolution: Multipliers in place of the rule's; the rule rounds.
        img_size: The input's side in pixels, whatever the rule says of resolution.
        **options: The rule's own: ``alpha`` of ``fast``; ``alpha``, ``beta``, ``gamma`` of ``compound``; ``epochs`` of
            ``resnet_rs``; ``vocabulary`` of ``language``.

    Raises:
        ConfigError: For an unknown rule, option or quantity, a target that is not a positive number, one that is
            below the smallest network of the family or larger than this machine's memory, a size that the family does
            not divide, or a rule that the family cannot follow.
    """
    base = get_config(model) if isinstance(model, str) else model
    if not isinstance(base, ModelConfig):
        raise ConfigError(f"The model is {type(model).__name__}; expected a name or a config.")
    found_rule = get_rule(rule)
    targets = {
        "factor": factor,
        "phi": phi,
        "flops": flops,
        "macs": macs,
        "params": params,
        "activations": activations,
        "latency_ms": latency_ms,
    }
    asked: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    own = {"depth": depth, "width": width, "resolution": resolution}
    multipliers = {name: value for name, value in own.items() if value is not None}
    _check_options(found_rule, options, [*targets, *own])
    _check_dimensions(base, found_rule.name, set(multipliers) or set(found_rule.dimensions))
    if len(asked) + bool(multipliers) != 1:
        named = " and ".join([*asked, *multipliers]) or "none"
        raise ConfigError(f"Expected one target of {', '.join(targets)}, or depth, width, resolution; got {named}.")
    search = _Search(base, found_rule, options, img_size)
    if multipliers:
        factors = Factors(**multipliers)
        return Fit(search.resize(factors), found_rule.name, factors, "factor", factors.cost, factors.cost)
    ((quantity, value),) = asked.items()
    if quantity in ("factor", "phi"):
        s = _factor_of_phi(found_rule, value, options) if quantity == "phi" else value
        check_factor(quantity, s)
        if not 1 / _MAX_FACTOR <= s <= _MAX_FACTOR:
            raise ConfigError(f"{quantity} is {value:g}; expected a cost between 1e-6 and 1e6 times the base's.")
        factors = search.factors(s)
        config = search.resize(factors)
        if s > 16:
            search.check_memory(config, quantity, value)
        return Fit(config, found_rule.name, factors, "factor", s, s)
    if quantity == "latency_ms":
        check_factor(quantity, value)
        return _fit_latency(search, value, target)
    if quantity == "flops":
        check_factor(quantity, value)
        quantity, value = "macs", f"{value}x"
    return search.meet(quantity, _absolute(quantity, value, base), lambda config: getattr(counts_of(config), quantity))


@lru_cache(maxsize=4096)
def counts_of(config: ModelConfig) -> Counts:
    """:func:`zoo.analysis.counts.count`, remembered; a variant's own is on file."""
    kind: Any = type(config)
    return _of_variants(kind).get(config) or count(config)


@lru_cache
def _of_variants(kind: Any) -> dict[ModelConfig, Counts]:
    """What the index says of the variants of a family."""
    known = {}
    for name, entry in index().items():
        if MODULES[entry["family"]] == kind.__module__ and "macs" in entry:
            known[get_config(name)] = Counts(entry["params"], entry["macs"], entry["activations"])
    return known


def measure_latency(config: ModelConfig, device: str = "cpu") -> float:
    """Median milliseconds of a fused forward pass on this machine, weights as they are initialised.

    Of one sample; of a language model's, as many tokens as ``zoo bench`` measures.
    """
    from zoo.analysis.bench import Conditions, as_measured, call_of
    from zoo.analysis.benchmark import measure
    from zoo.factory import build

    conditions = Conditions(device=device)
    conditions.check()
    model = as_measured(build(config), conditions)
    call = call_of(model, config, conditions, 1)
    timing = measure({"pass": call}, device=device, rounds=5, turn_s=0.05, warmup_s=1.0)["pass"]
    return 1e3 * timing.median


def _fit_latency(search: "_Search", target_ms: float, device: str) -> Fit:
    """Of configs that are predicted to meet a latency, or without a prediction are searched for, one that is measured.

    Where this machine is calibrated (``zoo calibrate``), a prediction makes the short list: the config that is
    predicted to meet the target is measured, and the next one is predicted with what that has shown.
    """
    from zoo.analysis.calibrate import predict_latency_ms

    def measured(config: ModelConfig) -> float:
        return measure_latency(config, device)

    if device != "cpu" or not _predictable(search.base):
        return search.meet("latency_ms", target_ms, measured)
    best: Fit | None = None
    aim = target_ms
    seen: set[ModelConfig] = set()
    for _ in range(_SHORT_LIST):
        predicted = search.meet("latency_ms", aim, predict_latency_ms)
        if predicted.config in seen:
            break
        seen.add(predicted.config)
        found = replace(predicted, target=target_ms, achieved=measured(predicted.config))
        best = found if best is None else min(best, found, key=lambda each: abs(each.error))
        if best.met:
            break
        aim *= target_ms / found.achieved
    assert best is not None
    return best


def _predictable(config: ModelConfig) -> bool:
    """Whether this machine's calibration knows the latency of such a config."""
    from zoo.analysis.calibrate import predict_latency_ms
    from zoo.errors import DataError

    try:
        predict_latency_ms(config)
    except DataError:  # not calibrated
        return False
    return True


def _check_options(rule: Rule, options: dict[str, float], targets: list[str]) -> None:
    for name in options:
        if name not in rule.options:
            expected = f"it takes {', '.join(rule.options)}" if rule.options else "it takes none"
            hint = nearest(name, [*rule.options, *targets, "img_size", "target"])
            raise ConfigError(f"The rule {rule.name!r} has no option {name!r}; {expected}.{hint}")


def _check_dimensions(base: ModelConfig, rule: str, needed: set[str]) -> None:
    missing = needed - dimensions(base)
    if missing:
        raise ConfigError(
            f"{type(base).__name__} has no {' or '.join(sorted(missing))} to scale, which the rule {rule!r} needs; "
            f"it can follow {', '.join(rules_for(base)) or 'none'}."
        )


def _factor_of_phi(rule: Rule, phi: Any, options: dict[str, float]) -> float:
    if rule.name != "compound":
        raise ConfigError(f"phi belongs to the rule 'compound'; the rule {rule.name!r} takes factor.")
    if isinstance(phi, bool) or not isinstance(phi, int | float) or not abs(phi) <= 20:
        raise ConfigError(f"phi is {phi!r}; expected a number from -20 to 20 (0 changes nothing).")
    return compound_base(**options) ** phi


def _absolute(quantity: str, value: Any, base: ModelConfig) -> float:
    """A target as a number: ``"4x"`` is four times the base's."""
    if isinstance(value, str):
        try:
            relative = float(value.removesuffix("x")) if value.endswith("x") else math.nan
        except ValueError:
            relative = math.nan
        if not 0 < relative < math.inf:
            raise ConfigError(f"{quantity} is {value!r}; expected a positive number, or a multiple such as '4x'.")
        return relative * getattr(counts_of(base), quantity)
    check_factor(quantity, value)
    return float(value)


@dataclass(frozen=True)
class _Move:
    """A step of one entry of one field."""

    distance: float  # from its product, in steps, once it is done
    name: str
    index: int
    step: int
    room: int  # how many of them may be done

    def least(self, config: ModelConfig) -> int:
        """The fewest steps that change a config: several where a width is of whole groups; 0 if none do."""
        return next((n for n in range(1, self.room + 1) if self.of(config, n) not in (None, config)), 0)

    def of(self, config: ModelConfig, steps: int) -> ModelConfig | None:
        """The config with so many steps done; None where its numbers do not fit together."""
        value = getattr(config, self.name)
        entries = list(value) if isinstance(value, tuple) else [value]
        entries[self.index] += steps * self.step
        if entries[self.index] < 1:
            return None
        try:
            return config.override(
                **config.fit({self.name: tuple(entries) if isinstance(value, tuple) else entries[0]})
            )
        except ConfigError:
            return None


class _Search:
    """Configs that one rule makes of one base."""

    def __init__(self, base: ModelConfig, rule: Rule, options: dict[str, float], img_size: int | None) -> None:
        self.base, self.rule, self.options = base, rule, options
        self.origin = base.scaling_origin() if rule.from_origin else base
        self.fixed = {} if img_size is None else {"img_size": _checked_size(base, img_size)}

    def factors(self, s: float) -> Factors:
        """The rule's factors for ``s`` times the cost of the base."""
        if self.origin is not self.base:
            s *= counts_of(self.base).macs / counts_of(self.origin).macs
        return self.rule.for_config(self.origin, s, **self.options)

    def resize(self, factors: Factors) -> ModelConfig:
        """The config that these factors make."""
        return resize(self.origin, factors, self.rule.rounding).override(**self.fixed)

    def meet(self, quantity: str, target: float, measure: Callable[[ModelConfig], float]) -> Fit:
        """The factor at which the measure meets the target; then what closes the gap that rounding left.

        That is the width, first of the whole network and then, one step of one entry at a time, of its parts. Counting
        takes a while: before a config is counted, its cost is foretold from that of those counted before, with what
        rounding does to each dimension, so that two or three counts are mostly enough.
        """
        start = target / measure(self.base)
        if not 1 / _MAX_FACTOR <= start <= _MAX_FACTOR:
            raise ConfigError(
                f"{quantity} is {target:.4g}, {start:.3g} times the base's; expected between 1e-6 and 1e6 times."
            )
        evaluated: dict[ModelConfig, float] = {}

        def evaluate(factors: Factors, config: ModelConfig | None = None) -> Fit:
            config = self.resize(factors) if config is None else config
            if config not in evaluated:
                self.check_memory(config, quantity, target)
                evaluated[config] = measure(config)
            return Fit(config, self.rule.name, factors, quantity, target, evaluated[config])

        wider = self._wider_than(self.factors(start if quantity == "macs" else min(1.0, start)))
        if self.rule.solve_width:
            best = self._solve(evaluate, wider, 1.0, quantity)
        else:
            best = self._solve(evaluate, self.factors, start, quantity)
        if best.factors.width != 1:
            if not self.rule.solve_width and abs(best.error) > _GOOD:
                polished = self._solve(evaluate, self._wider_than(best.factors), 1.0, quantity)
                best = min(best, polished, key=lambda each: abs(each.error))
            best = self._polish(evaluate, best)
        if best.error > TOLERANCE:
            smallest = evaluate(wider(1e-6) if self.rule.solve_width else self.factors(1e-6))
            if smallest.achieved >= best.achieved:
                raise ConfigError(
                    f"{quantity} is {target:.4g}; the smallest network that the rule {self.rule.name!r} makes from "
                    f"here has {smallest.achieved:.4g}."
                )
        return best

    def _polish(self, evaluate: Callable[[Factors, ModelConfig], Fit], best: Fit) -> Fit:
        """Where the target is missed, move single widths by steps, those first that rounding nearly put there."""
        tried = {best.config}
        while not best.met and len(tried) <= _STEPS:
            moves = ((move, move.least(best.config)) for move in self._moves(best))
            move, steps = next(((m, n) for m, n in moves if n and m.of(best.config, n) not in tried), (None, 0))
            if move is None:
                break
            found = self._moved(evaluate, best, move, steps, tried)
            gain = found.achieved - best.achieved
            more = min(move.room, steps * round((best.target - best.achieved) / gain)) if gain else 0
            if more > steps:
                found = min(found, self._moved(evaluate, best, move, more, tried), key=lambda each: abs(each.error))
            best = min(best, found, key=lambda each: abs(each.error))
        return best

    def _moved(
        self,
        evaluate: Callable[[Factors, ModelConfig], Fit],
        best: Fit,
        move: "_Move",
        steps: int,
        tried: set[ModelConfig],
    ) -> Fit:
        config = move.of(best.config, steps)
        if config is None or config in tried:
            return best
        tried.add(config)
        return evaluate(best.factors, config)

    def _moves(self, found: Fit) -> list["_Move"]:
        """Steps of one width each towards the target that do not leave its product far behind."""
        moves = []
        for spec in fields(found.config):
            axis = spec.metadata.get("axis")
            if axis is None or axis.dimension != "width" or spec.name in self.rule.rounding.fixed:
                continue
            value, old = getattr(found.config, spec.name), getattr(self.origin, spec.name)
            for i, entry in enumerate(value if isinstance(value, tuple) else (value,)):
                step = self.origin.granularity(spec.name, i)
                product = (old[i] if isinstance(value, tuple) else old) * found.factors.width
                sign = -1 if found.error > 0 else 1
                ahead = sign * (entry - product)  # how far it is already
                room = int((max(1.5 * step, _STRETCH * product) - ahead) / step)
                if room >= 1:
                    moves.append(_Move((ahead + step) / step, spec.name, i, sign * step, room))
        return sorted(moves, key=lambda each: abs(each.distance))

    def _wider_than(self, factors: Factors) -> Callable[[float], Factors]:
        """Factors as they are but for the width's, which becomes so many times larger as costs ``s`` times as much."""
        return lambda s: replace(factors, width=factors.width * math.sqrt(s))

    def _solve(
        self, evaluate: Callable[[Factors], Fit], factors: Callable[[float], Factors], s: float, quantity: str
    ) -> Fit:
        """The best fit over one positive number in which the cost grows."""
        low, high = 0.0, math.inf  # where the cost is known to be too low, too high
        best = found = evaluate(factors(s))
        seen = {found.config}
        for _ in range(_STEPS):
            if abs(best.error) <= _GOOD:
                break
            low, high = (low, min(high, s)) if found.error > 0 else (max(low, s), high)
            correction = found.achieved / self._foretold(found.config, quantity)
            step = self._foresee(factors, found.target / correction, quantity, (low or s / 64, min(high, s * 64)), seen)
            if step is None:
                break
            s = step
            found = evaluate(factors(s))
            seen.add(found.config)
            best = min(best, found, key=lambda each: abs(each.error))
        return best

    def _foresee(
        self,
        factors: Callable[[float], Factors],
        target: float,
        quantity: str,
        bounds: tuple[float, float],
        seen: set[ModelConfig],
    ) -> float | None:
        """The number whose foretold cost is nearest to the target, of a config not seen yet: none is counted."""
        low, high = bounds
        tried: list[tuple[float, float]] = []
        while high / low > 1.0005:
            middle = math.sqrt(low * high)
            config = self.resize(factors(middle))
            cost = self._foretold(config, quantity)
            if config not in seen:
                tried.append((abs(math.log(cost / target)), middle))
            low, high = (middle, high) if cost < target else (low, middle)
        return min(tried)[1] if tried else None

    def _foretold(self, config: ModelConfig, quantity: str) -> float:
        """About what a config costs, relative to the origin, from its rounded dimensions alone."""
        by_width = {"macs": 2, "params": 2, "activations": 1, "latency_ms": 1}[quantity]
        old, new = _by_dimension(self.origin), _by_dimension(config)
        ratios = [
            [after / before if before else 1.0 for before, after in zip(*pair, strict=True)]
            for pair in zip(old["width"], new["width"], strict=True)
        ]
        mean = sum(map(sum, ratios)) / sum(map(len, ratios)) if ratios else 1.0
        blocks, cost = 0, 0.0
        for before, after in zip(old["depth"], new["depth"], strict=True):
            of_stage = next((each for each in ratios if len(each) == len(after) > 1), [mean] * len(after))
            blocks += sum(before)
            cost += sum(depth * ratio**by_width for depth, ratio in zip(after, of_stage, strict=True))
        area = _area(new) / _area(old) if quantity != "params" else 1.0
        return area * (cost / blocks if blocks else mean**by_width)

    def check_memory(self, config: ModelConfig, quantity: str, target: float) -> None:
        """Refuse what this machine could not hold, before it is built or counted layer by layer."""
        base = counts_of(self.base)
        params, activations = (
            getattr(base, name) * self._foretold(config, name) / self._foretold(self.base, name)
            for name in ("params", "activations")
        )
        needed, memory = 4 * (params + activations), _memory()
        if needed > memory:
            raise ConfigError(
                f"{quantity} is {target:.4g}; about {params:.2g} parameters and {activations:.2g} activations take "
                f"{needed / 2**30:,.0f} GiB in float32, and this machine has {memory / 2**30:,.0f} GiB."
            )


def _by_dimension(config: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """The fields of each dimension in order, each as a tuple."""
    found: dict[str, list[tuple[int, ...]]] = {"depth": [], "width": [], "resolution": []}
    for spec in fields(config):
        if "axis" in spec.metadata and spec.metadata["axis"].dimension in found:
            value = getattr(config, spec.name)
            found[spec.metadata["axis"].dimension].append(value if isinstance(value, tuple) else (value,))
    return found


def _area(dimensions: dict[str, list[tuple[int, ...]]]) -> float:
    """Of the input, in pixels."""
    return math.prod(side ** (2 / len(sides)) for sides in dimensions["resolution"] for side in sides)


def _memory() -> float:
    """Bytes of main memory; infinite where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _checked_size(base: ModelConfig, img_size: Any) -> int:
    """A side in pixels that the family can take.

    Raises:
        ConfigError: With the nearest sizes, if it does not divide.
    """
    if "resolution" not in dimensions(base):
        raise ConfigError(f"{type(base).__name__} has no resolution; expected no img_size.")
    multiple = base.granularity("img_size", 0)
    if isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1:
        raise ConfigError(f"img_size is {img_size!r}; expected a side in pixels, a positive multiple of {multiple}.")
    if img_size % multiple:
        below = img_size // multiple * multiple
        raise ConfigError(
            f"img_size is {img_size}, which {type(base).__name__} does not divide into multiples of {multiple}; "
            f"the nearest are {max(below, multiple)} and {below + multiple}."
        )
    return img_size
