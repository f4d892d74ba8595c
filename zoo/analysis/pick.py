"""``zoo pick``: which model to use under a budget, from speed records, published accuracies and licences.

Records of this machine come first; those of others take part only when they are asked for, and say whose they are.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import zoo
from zoo.analysis.benchmark import Passport, machine
from zoo.analysis.records import local_records, read_records, shipped_records
from zoo.errors import ConfigError, DataError, UnknownModelError, nearest
from zoo.pretrained.manifest import Weights, list_weights
from zoo.registry import family_name, index, is_model, split_name

PUBLISHED_ON = "imagenet-1k"
AUTHORS = "zoo's authors"
DEVICES = ("cpu", "cuda", "mps")
RUNNERS_UP = 3
SHORTLIST = 8  # models that are measured because their predicted latency fits
MARGIN = 1.3  # times the budget that a predicted latency may take to be on the short list


@dataclass(frozen=True)
class Option:
    """One model on one target, with all that a choice may depend on. What is not known is None."""

    model: str
    weights: str | None  # whose accuracy it is
    family: str
    top1: float | None  # published, percent of ImageNet-1k
    source: str | None  # of the accuracy
    licence: str | None  # of the weights
    params: int
    macs: int
    size_mb: float | None  # weights in memory
    latency_ms: float  # batch 1
    latency_q: tuple[float, float]  # quartiles
    images_per_s: float  # at the batch that gives most
    throughput_batch: int
    memory_mb: float | None  # at the peak of a call, batch 1
    device: str
    runtime: str
    precision: str
    threads: int
    clock: str
    here: bool
    where: str  # the machine, for people
    command: str

    @property
    def target(self) -> str:
        """What the figures were measured on, for people."""
        return f"{self.where}, {self.threads} threads, {self.runtime}, {self.precision}, {self.clock} time"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may cost at most, or has to reach at least. None and "" set no limit."""

    latency_ms: float | None = None
    images_per_s: float | None = None  # at least
    size_mb: float | None = None
    memory_mb: float | None = None
    params_m: float | None = None  # millions
    macs_m: float | None = None  # millions
    top1: float | None = None  # at least, percent
    licence: str = ""  # SPDX identifiers with commas between them
    runtime: str = ""
    precision: str = ""
    threads: int | None = None  # those that it was measured with
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("latency_ms", "images_per_s", "size_mb", "memory_mb", "params_m", "macs_m", "top1"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value}; expected a number above 0.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; expected at least 1.")

    def objections(self, option: Option) -> list[str]:
        """Why an option is not within the budget; empty if it is."""
        found = []

        def at_most(what: str, value: float | None, limit: float | None, unit: str) -> None:
            if limit is not None and value is None:
                found.append(f"{what} is not measured")
            elif limit is not None and value is not None and value > limit:
                found.append(f"{what} is {value:.4g} {unit}, {value / limit:.2f} times the {limit:g} allowed")

        def at_least(what: str, value: float | None, limit: float | None, unit: str) -> None:
            if limit is not None and value is None:
                found.append(f"{what} is not known")
            elif limit is not None and value is not None and value < limit:
                found.append(f"{what} is {value:.4g} {unit}; at least {limit:g} is asked for")

        at_most("latency", option.latency_ms, self.latency_ms, "ms")
        at_least("throughput", option.images_per_s, self.images_per_s, "images/s")
        at_most("size", option.size_mb, self.size_mb, "MB")
        at_most("peak memory", option.memory_mb, self.memory_mb, "MB")
        at_most("parameter count", option.params / 1e6, self.params_m, "M")
        at_most("MAC count", option.macs / 1e6, self.macs_m, "M")
        at_least("published accuracy", option.top1, self.top1, "%")
        licences = [each.strip().lower() for each in self.licence.split(",") if each.strip()]
        if licences and (option.licence or "") not in licences:
            found.append(f"licence is {option.licence or 'not known'}; {' or '.join(licences)} is asked for")
        if option.top1 is None and self.top1 is None:
            found.append(f"no accuracy on {PUBLISHED_ON} is published for it at this resolution")
        return found


@dataclass(frozen=True)
class Choice:
    """The answer: the model to use, those that come next, and the Pareto set among all that fit."""

    budget: Budget
    best: Option | None
    runners_up: tuple[Option, ...]
    pareto: tuple[Option, ...]
    options: tuple[Option, ...] = field(repr=False)  # all that were looked at
    measured: tuple[str, ...] = ()  # models measured for this choice, because their predicted latency fits

    def why_not(self, model: str) -> str:
        """One sentence on why ``model`` is not the answer.

        Raises:
            UnknownModelError: If there is no such model.
        """
        if not is_model(model):
            zoo.get_config(model)  # raises, with the nearest names
        option = next((each for each in self.options if model in (each.model, each.weights)), None)
        if option is None:
            return f"{model}: no record of it on {self.budget.device}; `zoo bench {model}` makes one."
        if option is self.best:
            return f"{model} is the answer."
        objections = self.budget.objections(option)
        if objections:
            return f"{model}: {'; '.join(objections)}."
        assert self.best is not None
        return f"{model} fits, but {compared(self.best, option)}."


def compared(best: Option, other: Option) -> str:
    """How the better of two differs, in words."""
    words = []
    if best.top1 is not None and other.top1 is not None:
        words.append(f"{best.model} has {best.top1 - other.top1:+.1f} points of accuracy")
    ratio = best.latency_ms / other.latency_ms
    overlap = best.latency_q[0] <= other.latency_q[1] and other.latency_q[0] <= best.latency_q[1]
    words.append("a latency that cannot be told from its" if overlap else f"{ratio:.2f} times its latency")
    return " at ".join(words)


def gather(
    device: str = "cpu", *, others: bool = False, runtime: str = "", precision: str = "", threads: int | None = None
) -> list[Option]:
    """All options on a device: one for each model and target that has records.

    Args:
        device: Where, ``"cpu"`` or ``"cuda"``.
        others: Whether to take records of other machines too.
        runtime: Only this one, such as ``"eager, fused"``.
        precision: Only this one.
        threads: Only what was measured with so many.

    Raises:
        ConfigError: If there is no such device in any record, nor in torch.
    """
    shipped = [record for path in shipped_records() for record in read_records(path)]
    records = [replace(record, measured_by=AUTHORS) for record in shipped]  # a machine like theirs is not theirs
    if local_records().is_file():
        records += read_records(local_records())
    known = dict.fromkeys([*DEVICES, *(record.device.partition(":")[0] for record in records)])
    if device.partition(":")[0] not in known:
        raise ConfigError(f"device is {device!r}; expected {', '.join(known)}.{nearest(device, known)}")
    return options(
        record
        for record in records
        if record.device.partition(":")[0] == device.partition(":")[0]
        and (others or _is_here(record))
        and runtime in ("", record.backend)
        and precision in ("", record.precision)
        and threads in (None, record.threads)
    )


def _gather(budget: Budget, others: bool) -> list[Option]:
    return gather(
        budget.device,
        others=others,
        runtime=budget.runtime,
        precision=budget.precision,
        threads=budget.threads,
    )


def _is_here(record: Passport) -> bool:
    return record.machine == machine()["id"] and record.measured_by == "zoo"


def options(records: Iterable[Passport]) -> list[Option]:
    """One option for each model and target: latency at batch 1, throughput at the batch that gives most."""
    groups: dict[tuple[Any, ...], list[Passport]] = {}
    for record in records:
        if record.config or not is_model(record.model) or split_name(record.model)[0] not in index():
            continue  # a config without a name has no published accuracy
        target = (record.machine, record.device, record.backend, record.precision, record.threads, record.clock)
        groups.setdefault((record.model, record.measured_by, *target), []).append(record)
    found = []
    for group in groups.values():
        single = [record for record in group if record.batch == 1]
        if single:
            found.append(_option(single[-1], max(group, key=lambda record: record.samples_per_s)))
    return found


def _option(single: Passport, fastest: Passport) -> Option:
    variant, _ = split_name(single.model)
    costs = index()[variant]
    weights = published(single.model)
    where = single.gpu if single.device != "cpu" and single.gpu else f"{single.cpu} ({single.cores} cores)"
    return Option(
        model=single.model,
        weights=weights.name if weights else None,
        family=family_name(variant),
        top1=weights.metrics[0].top1 if weights else None,
        source=weights.metrics[0].source if weights else None,
        licence=weights.licence if weights else None,
        params=costs["params"],
        macs=costs["macs"],
        size_mb=None if single.weight_memory is None else single.weight_memory / 1e6,
        latency_ms=single.latency_ms,
        latency_q=(single.latency_ms_q1, single.latency_ms_q3),
        images_per_s=fastest.samples_per_s,
        throughput_batch=fastest.batch,
        memory_mb=None if single.peak_memory is None else single.peak_memory / 1e6,
        device=single.device,
        runtime=single.backend,
        precision=single.precision,
        threads=single.threads,
        clock=single.clock,
        here=_is_here(single),
        where=where if single.measured_by == "zoo" else f"{where}, by {single.measured_by}",
        command=single.command,
    )


def published(model: str) -> Weights | None:
    """The weights whose accuracy is quoted for a model as it was measured: at its own resolution, for ImageNet-1k."""
    variant, tag = split_name(model)
    for weights in list_weights(variant):
        if tag and weights.tag != tag:
            continue
        if not tag and weights.config:  # of other classes, or of another resolution
            continue
        if weights.metrics and weights.metrics[0].dataset == PUBLISHED_ON:
            return weights
    return None


def pareto_set(options: Sequence[Option], limits: Iterable[str] = ()) -> list[Option]:
    """The options that no other beats: at least as good in accuracy, latency and what is limited, better in one."""
    costs: dict[str, Callable[[Option], float]] = {
        "images_per_s": lambda option: -option.images_per_s,
        "size_mb": lambda option: option.size_mb or math.inf,
        "memory_mb": lambda option: option.memory_mb or math.inf,
        "params_m": lambda option: option.params,
        "macs_m": lambda option: option.macs,
    }
    measures = [lambda option: -(option.top1 or 0.0), lambda option: option.latency_ms]
    measures += [costs[name] for name in limits if name in costs]
    points = [tuple(measure(option) for measure in measures) for option in options]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)

    front = [option for option, point in zip(options, points, strict=True) if not beaten(point)]
    return sorted(front, key=lambda option: option.latency_ms)


def pick(
    budget: Budget | None = None,
    *,
    others: bool = False,
    shortlist: bool = True,
    **limits: Any,
) -> Choice:
    """The most accurate model within a budget; with only a minimum accuracy, the fastest.

    Models that are not measured here, but whose latency the machine's calibration predicts to fit, are measured first:
    the eight most accurate of them.

    Args:
        budget: The limits, or give them as keywords: ``pick(latency_ms=5)``.
        others: Whether records of other machines take part; they say whose they are.
        shortlist: Whether to measure models for it.

    Raises:
        ConfigError: For a limit that there is not, or one out of range.
        DataError: If nothing is measured on the device; says what to run.
    """
    if limits:
        names = list(Budget.__dataclass_fields__)
        for name in limits:
            if name not in names:
                raise ConfigError(f"There is no limit {name!r}; expected {', '.join(names)}.{nearest(name, names)}")
        budget = Budget(**limits)
    budget = budget or Budget()
    found = _gather(budget, others)
    measured = _measure_shortlist(budget, found) if shortlist and not others else ()
    if measured:
        found = _gather(budget, others)
    if not found:
        raise DataError(_nothing_measured(budget, others))
    fitting = [option for option in found if not budget.objections(option)]
    limited = [name for name in Budget.__dataclass_fields__ if getattr(budget, name) not in (None, "")]
    costs_limited = set(limited) - {"top1", "licence", "runtime", "precision", "threads", "device"}
    if budget.top1 is not None and not costs_limited:
        ranked = sorted(fitting, key=lambda option: (option.latency_ms, -(option.top1 or 0.0)))
    else:
        ranked = sorted(fitting, key=lambda option: (-(option.top1 or 0.0), option.latency_ms))
    best = ranked[0] if ranked else None
    runners_up: list[Option] = []
    for option in ranked[1:]:  # a model on another target is not another model
        if option.model not in {best.model if best else "", *(each.model for each in runners_up)}:
            runners_up.append(option)
    return Choice(
        budget=budget,
        best=best,
        runners_up=tuple(runners_up[:RUNNERS_UP]),
        pareto=tuple(pareto_set(fitting, limited)),
        options=tuple(found),
        measured=tuple(measured),
    )


def _nothing_measured(budget: Budget, others: bool) -> str:
    named = {name: getattr(budget, name) for name in ("runtime", "precision", "threads")}
    asked = "".join(f", {name} {value!r}" for name, value in named.items() if value)
    message = f"Nothing is measured on this machine's {budget.device}{asked}"
    elsewhere = len(_gather(budget, True))
    hint = f"; --others takes the {elsewhere} models measured on other machines" if elsewhere and not others else ""
    return f"{message}: run `zoo calibrate`, or `zoo bench 'efficient*' --device {budget.device}`, first{hint}."


def _measure_shortlist(budget: Budget, known: Sequence[Option]) -> Sequence[str]:
    """Measure the models, as yet unmeasured, that the calibration predicts to fit a latency; their names."""
    from zoo.analysis.bench import Conditions, bench
    from zoo.analysis.calibrate import find_calibration

    if budget.latency_ms is None or budget.device != "cpu" or budget.runtime not in ("", "eager, fused"):
        return ()
    calibration = find_calibration()
    if calibration is None or budget.precision not in ("", calibration.precision):
        return ()
    if budget.threads not in (None, calibration.threads):
        return ()
    measured = {option.model for option in known}
    accurate = [(published(name), name) for name in zoo.list_models(task="image-classification")]
    waiting = sorted(
        ((-(weights.metrics[0].top1 or 0.0), name) for weights, name in accurate if weights and name not in measured),
    )
    wanted: list[str] = []
    for _, name in waiting:
        if len(wanted) < SHORTLIST and calibration.predict_ms(name) <= MARGIN * budget.latency_ms:
            wanted.append(name)
    if wanted:
        bench(wanted, conditions=Conditions(threads=calibration.threads, clock=calibration.clock))
    return wanted


def check_model(name: str) -> None:
    """Raise UnknownModelError, with the nearest names, if there is no such model."""
    if not is_model(name):
        raise UnknownModelError(f"Unknown model {name!r}.{nearest(name, zoo.list_models())}")
