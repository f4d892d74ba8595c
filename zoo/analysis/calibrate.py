"""How long any model of the zoo takes on this machine, predicted from a table of its operators that is fitted once.

Models are run with every operator timed. For each kind of operator, the logarithm of its time is fitted as a linear
function of the logarithms of its sizes, and corrected by what the fit leaves over of the most similar operators.
A model's latency is the sum over its operators, and a constant for each that stands for Python, both scaled to whole
models. Which those are is seen from two untimed passes with weights of zero.

A prediction is for making a short list; what is on it is measured. The error is of models that the fit has not seen.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from zoo.analysis.bench import Conditions, as_measured, call_of, example_input
from zoo.analysis.benchmark import machine, measure, torch_threads, versions
from zoo.analysis.trace import Operator, trace
from zoo.atomic import write_atomically
from zoo.config import ModelConfig
from zoo.errors import ConfigError, DataError
from zoo.pretrained.files import cache_folder
from zoo.registry import family_of, index

PASSES = 5  # of each model with timed operators; the median of each operator counts
FOLDS = 6
NEIGHBOURS = 4
MAX_MACS = 2_000_000_000  # of the models that are run by default
_OWN_TABLE = ("elementwise", "pool", "copy", "other", "routing")  # kinds whose operators differ too much for one table


@dataclass(frozen=True)
class Sample:
    """One model, measured: its operators as rows of (table, features, seconds), and its latency in seconds."""

    model: str
    family: str
    batch: int
    rows: tuple[tuple[str, tuple[float, ...], float], ...]
    latency: float


@dataclass(frozen=True)
class Table:
    """Of one kind of operator: the linear fit, and the operators that were timed with what it leaves over."""

    weights: np.ndarray  # [1 + F]
    features: np.ndarray  # [N, F]
    rest: np.ndarray  # [N], in logarithms of seconds

    def seconds(self, features: Sequence[float]) -> float:
        x = np.asarray(features)
        distance = np.abs(self.features - x).sum(1)
        nearest = np.argsort(distance)[:NEIGHBOURS]
        closeness = 1 / (distance[nearest] + 1e-3) ** 2
        # Far from all that was timed, the 0.5 leaves the linear fit alone.
        correction = (closeness * self.rest[nearest]).sum() / (closeness.sum() + 0.5)
        return math.exp(self.weights[0] + x @ self.weights[1:] + correction)


@dataclass(frozen=True)
class Fit:
    """Tables by kind, and how their sum becomes the latency of a model."""

    tables: dict[str, Table]
    scale: float
    per_operator: float  # seconds

    def latency(self, rows: Iterable[tuple[str, Sequence[float]]]) -> float:
        rows = list(rows)
        total = sum(self.tables[kind].seconds(features) for kind, features in rows if kind in self.tables)
        return self.scale * total + self.per_operator * len(rows)


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit the tables to samples."""
    by_kind: dict[str, dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        for kind, features, seconds in sample.rows:
            by_kind[kind][features].append(math.log(max(seconds, 1e-9)))
    tables = {}
    for kind, timed in by_kind.items():
        sizes = np.array(list(timed))
        logs = np.array([statistics.median(values) for values in timed.values()])
        design = np.column_stack([np.ones(len(sizes)), sizes])
        weights = np.linalg.solve(design.T @ design + 1e-2 * np.eye(design.shape[1]), design.T @ logs)
        tables[kind] = Table(weights, sizes, logs - design @ weights)
    # Least squares of relative errors; a negative constant would make small models take no time.
    sums = np.array([sum(seconds for _, _, seconds in sample.rows) for sample in samples])
    counts = np.array([len(sample.rows) for sample in samples])
    latencies = np.array([sample.latency for sample in samples])
    design = np.column_stack([sums, counts]) / latencies[:, None]
    scale, constant = np.linalg.lstsq(design, np.ones(len(samples)), rcond=None)[0]
    if constant < 0 or scale <= 0:
        scale, constant = statistics.median(latencies / sums), 0.0
    return Fit(tables, float(scale), float(constant))


def left_out_errors(samples: Sequence[Sample], groups: Sequence[str]) -> list[float]:
    """Relative errors of each sample's latency, predicted from a fit to the samples of other groups."""
    errors = []
    for group in sorted(set(groups)):
        known = [sample for sample, its in zip(samples, groups, strict=True) if its != group]
        if not known:
            continue
        fitted = fit(known)
        for sample, its in zip(samples, groups, strict=True):
            if its == group:
                predicted = fitted.latency((kind, features) for kind, features, _ in sample.rows)
                errors.append(predicted / sample.latency - 1)
    return errors


@dataclass(frozen=True)
class Calibration:
    """The samples of one machine under one set of conditions, and what a fit to them is worth."""

    machine: str
    device: str
    threads: int
    clock: str
    precision: str
    versions: str
    samples: tuple[Sample, ...]

    def fit(self) -> Fit:
        """The fit to all samples."""
        return fit(self.samples)

    def errors(self) -> dict[str, float]:
        """Median relative errors of models left out: one model in six at a time, and a whole family at a time."""
        models = sorted({sample.model for sample in self.samples})
        fold = {model: f"{i % FOLDS}" for i, model in enumerate(models)}
        found = {
            "models": left_out_errors(self.samples, [fold[sample.model] for sample in self.samples]),
            "families": left_out_errors(self.samples, [sample.family for sample in self.samples]),
        }
        return {what: statistics.median(map(abs, errors)) for what, errors in found.items() if errors}

    def predict_ms(self, config: ModelConfig | str, *, batch: int = 1) -> float:
        """The predicted latency of a model, fused, in milliseconds."""
        if isinstance(config, str):
            config = zoo.get_config(config)
        return 1e3 * self._fitted().latency((kind, features) for kind, features in operators_of(config, batch))

    def _fitted(self) -> Fit:
        if "fitted" not in self.__dict__:
            object.__setattr__(self, "fitted", self.fit())
        return self.__dict__["fitted"]


def table_and_features(operator: Operator) -> tuple[str, tuple[float, ...]]:
    """In which table an operator is, and the logarithms of its sizes."""
    table = operator.name if operator.kind in _OWN_TABLE else operator.kind
    sizes = (operator.macs, operator.read, operator.written, operator.weights, *operator.sizes)
    return f"{table}/{len(sizes)}", tuple(math.log1p(size) for size in sizes)


def operators_of(config: ModelConfig, batch: int = 1) -> list[tuple[str, tuple[float, ...]]]:
    """Table and features of each operator of a config's model, fused.

    It runs twice, untimed, on a CPU and with weights of zero: which operators a fused model calls depends on the sizes
    of its layers and maps, and the first pass packs the weights.
    """
    model: Any = zoo.build(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    model, x = as_measured(model, Conditions()), example_input(config, batch)
    trace(model, x)
    return [table_and_features(operator) for operator in trace(model, x)]


def default_models() -> list[str]:
    """The image models that take less than 2 GMACs."""
    return [name for name in zoo.list_models(task="image-classification") if index()[name]["macs"] < MAX_MACS]


def calibrate(
    models: Sequence[str] | None = None,
    *,
    batches: Iterable[int] = (1,),
    conditions: Conditions | None = None,
    save: bool = True,
    on_sample: Callable[[Sample], object] | None = None,
) -> Calibration:
    """Run models with every operator timed, and keep the result for :func:`load_calibration`.

    Args:
        models: Names; by default all image models under 2 GMACs.
        batches: Which to run.
        conditions: As for :func:`~zoo.analysis.bench.bench`, in float32, eager and fused; ``rounds`` is for the latency
            of whole models.
        save: Whether to keep it.
        on_sample: Called with each sample.

    Raises:
        UnknownModelError, ConfigError: As ``bench`` does; for fewer than three models.
    """
    conditions = conditions or Conditions(rounds=5)
    conditions.check()
    for name, expected in (("precision", "fp32"), ("backend", "eager"), ("fuse", True)):  # what predictions are of
        if getattr(conditions, name) != expected:
            raise ConfigError(f"{name} is {getattr(conditions, name)!r}; expected {expected!r} to calibrate.")
    names = list(models or default_models())
    if len(names) < 3:
        raise ConfigError(f"{len(names)} models to calibrate with; expected at least 3, of more than one family.")
    samples = []
    with torch_threads(conditions.threads):
        threads = torch.get_num_threads()
        for name in names:
            config = zoo.get_config(name)
            model = as_measured(zoo.build(config), conditions)
            for batch in batches:
                sample = _sample(name, config, model, batch, conditions)
                samples.append(sample)
                if on_sample is not None:
                    on_sample(sample)
    found = Calibration(
        machine=machine()["id"],
        device=conditions.device,
        threads=threads,
        clock=conditions.clock,
        precision=conditions.precision,
        versions=versions(),
        samples=tuple(samples),
    )
    if save:
        save_calibration(found, calibration_path(conditions.device, threads, conditions.clock))
    return found


def _sample(name: str, config: ModelConfig, model: Any, batch: int, conditions: Conditions) -> Sample:
    x = example_input(config, batch, tokens=conditions.tokens, device=conditions.device)
    trace(model, x)
    passes = [trace(model, x, clock=conditions.clock) for _ in range(PASSES)]
    rows = []
    for calls in zip(*passes, strict=True):
        seconds = statistics.median(call.seconds or 0.0 for call in calls)
        rows.append((*table_and_features(calls[0]), seconds))
    timing = measure(
        {"model": call_of(model, config, conditions, batch)},
        device=conditions.device,
        threads=conditions.threads,
        clock=conditions.clock,
        rounds=conditions.rounds,
        warmup_s=1.0,
    )["model"]
    return Sample(name, family_of(config).name, batch, tuple(rows), timing.median)


def calibration_path(device: str = "cpu", threads: int | None = None, clock: str = "wall") -> Path:
    """Where the calibration of this machine is kept."""
    name = f"calibration-{machine()['id']}-{device.replace(':', '')}-{threads or torch.get_num_threads()}-{clock}.json"
    return cache_folder("speed") / name


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(json.dumps(asdict(calibration)).encode())


def load_calibration(device: str = "cpu", threads: int | None = None, clock: str = "wall") -> Calibration:
    """The calibration of this machine.

    Raises:
        DataError: If there is none, or its file is damaged; says what to run.
    """
    path = calibration_path(device, threads, clock)
    if not path.is_file():
        command = f"zoo calibrate --device {device} --threads {threads or torch.get_num_threads()} --clock {clock}"
        raise DataError(f"This machine is not calibrated for {device}; run `{command}` first.")
    return read_calibration(path)


def read_calibration(path: Path) -> Calibration:
    """The calibration that a file holds.

    Raises:
        DataError: If it is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        samples = tuple(
            Sample(**{**each, "rows": tuple((kind, tuple(features), s) for kind, features, s in each["rows"])})
            for each in values.pop("samples")
        )
        return Calibration(**values, samples=samples)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged; remove it and run `zoo calibrate` again.") from error


def find_calibration(device: str = "cpu") -> Calibration | None:
    """The newest calibration of this machine, whatever its threads and clock; None if there is none."""
    paths = cache_folder("speed").glob(f"calibration-{machine()['id']}-{device.replace(':', '')}-*.json")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else read_calibration(newest)


def predict_latency_ms(config: ModelConfig | str, *, batch: int = 1, threads: int | None = None) -> float:
    """The predicted latency on this machine's CPU, from its saved calibration. For a short list: measure what is on it.

    Raises:
        DataError: If this machine is not calibrated.
    """
    return load_calibration(threads=threads).predict_ms(config, batch=batch)
