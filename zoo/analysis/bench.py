"""``zoo bench``: latency, throughput and peak memory of models by name, as speed passports."""

import dataclasses
import gc
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.analysis.benchmark import Passport, measure, passport, torch_threads, weight_bytes, working_memory
from zoo.analysis.records import local_records, save_records
from zoo.config import ImageConfig, ModelConfig, TextConfig
from zoo.deploy.engines import Job, engine_names
from zoo.deploy.program import DTYPES
from zoo.deploy.single import check_engine, run_in_engine
from zoo.errors import ConfigError, nearest
from zoo.factory import check_device

BACKENDS = ("eager", "compile")  # torch's own; the engines of zoo.deploy come after them
GROUP = 6  # models that take turns: more would have to be in memory at once
SATURATED = 1.05  # a batch saturates if twice the batch gives less than 5 % more throughput
SLOW = 2.0  # seconds of one call from which on no larger batch is tried


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which models are measured; the fields of :class:`Passport` that the user chooses."""

    device: str = "cpu"
    threads: int | None = None  # of torch, as it is set by default
    precision: str = "fp32"
    backend: str = "eager"
    fuse: bool = True  # measure image models as they are used for inference
    clock: str = "wall"
    rounds: int = 9
    tokens: int = 128  # of a language model's input

    def check(self) -> None:
        """Raise ConfigError for a condition that cannot be met here."""
        check_device(self.device)
        for name, choices in (("precision", DTYPES), ("backend", backends())):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; expected {', '.join(choices)}.{nearest(value, choices)}")
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}; expected at least 1.")
        if self.in_engine:
            check_engine(self.job())

    @property
    def in_engine(self) -> bool:
        """Whether another runtime than torch's own runs the model."""
        return self.backend not in BACKENDS

    def job(self, batch: int = 1) -> Job:
        """What an engine is to do."""
        threads = self.threads or torch.get_num_threads()
        return Job(engine=self.backend, precision=self.precision, target=self.device, threads=threads, batch=batch)

    @property
    def options(self) -> str:
        """The conditions as options of ``zoo bench``."""
        words = ["--device", self.device, "--threads", str(self.threads or torch.get_num_threads())]
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name in ("device", "threads") or value == spec.default:
                continue
            words += ["--no-fuse"] if spec.name == "fuse" else [f"--{spec.name}", str(value)]
        return shlex.join(words)


def backends() -> list[str]:
    """All that can run a model here or elsewhere: eager, compile, and the engines of ``zoo optimize``."""
    return [*BACKENDS, *engine_names()]


def input_shape(config: ModelConfig, batch: int, *, tokens: int = 128) -> tuple[int, ...]:
    """What a config's model takes: ``[B, C, H, W]`` pictures, or ``[B, T]`` token numbers.

    Raises:
        ConfigError: If the config is neither an image model's nor a language model's.
    """
    if isinstance(config, ImageConfig):
        return (batch, config.in_chans, *config.input_hw)
    if isinstance(config, TextConfig):
        return (batch, tokens)
    raise ConfigError(f"{type(config).__name__} is neither an image model's config nor a language model's.")


def example_input(config: ModelConfig, batch: int, *, tokens: int = 128, device: str = "cpu") -> Tensor:
    """Noise of :func:`input_shape`, made on the device; the same each time.

    Raises:
        ConfigError: If the config is neither an image model's nor a language model's.
    """
    shape = input_shape(config, batch, tokens=tokens)
    generator = torch.Generator(device).manual_seed(0)
    if isinstance(config, TextConfig):
        return torch.randint(config.vocab_size, shape, generator=generator, device=device)
    return torch.randn(shape, generator=generator, device=device)


def as_measured(model: Any, conditions: Conditions) -> Any:
    """The model in the form in which it is measured: in eval mode, fused, on its device, in its precision, compiled."""
    model = model.eval()
    if conditions.fuse and hasattr(model, "fuse"):
        model = model.fuse()
    if conditions.in_engine:
        return model  # the engine has its own device and precision
    model = model.to(conditions.device, DTYPES[conditions.precision])
    return torch.compile(model) if conditions.backend == "compile" else model


def bench(
    models: str | ModelConfig | Sequence[str | ModelConfig],
    *,
    batches: Iterable[int] = (1,),
    conditions: Conditions | None = None,
    save: bool = True,
    on_record: Callable[[Passport], object] | None = None,
) -> list[Passport]:
    """Measure models by name or config: batch 1, the saturating batch (or the best tried), and others asked for.

    Weights are random, which changes no time. Models take turns in groups of six; records are kept after each group.

    Args:
        models: Names, wildcards of names, configs.
        batches: Besides 1 and the saturating one.
        conditions: By default the CPU in float32, fused, as many threads as torch is set to.
        save: Whether to keep the records for ``zoo pick`` and ``zoo pareto``.
        on_record: Called with each record.

    Raises:
        UnknownModelError: If nothing matches a name.
        ConfigError: If a condition cannot be met here.
    """
    conditions = conditions or Conditions()
    conditions.check()
    wanted = sorted({1, *batches})
    if wanted[0] < 1:
        raise ConfigError(f"A batch is {wanted[0]}; expected at least 1.")
    named = resolve(models)
    records: list[Passport] = []
    for start in range(0, len(named), GROUP):
        group = named[start : start + GROUP]
        try:
            found = _bench_group(group, wanted, conditions)
        except torch.OutOfMemoryError:  # of a GPU, which cannot hold the largest batches of all of them
            gc.collect()
            found = [record for each in group for record in _bench_group([each], wanted, conditions)]
        if save:
            save_records(found, local_records())
        records += found
        if on_record is not None:
            for record in found:
                on_record(record)
        gc.collect()
    return records


def resolve(models: str | ModelConfig | Sequence[str | ModelConfig]) -> list[tuple[str, ModelConfig]]:
    """(name, config) of each model; a name may be a wildcard, a config goes by its family's name.

    Raises:
        UnknownModelError: If nothing matches.
    """
    named: dict[str, ModelConfig] = {}
    for entry in [models] if isinstance(models, str | ModelConfig) else models:
        if isinstance(entry, ModelConfig):
            from zoo.registry import family_of

            named[f"{family_of(entry).name}({len(named)})"] = entry
        elif any(sign in entry for sign in "*?["):
            names = zoo.list_models(entry)
            if not names:
                raise zoo.UnknownModelError(
                    f"No model matches {entry!r}.{nearest(entry.strip('*'), zoo.list_models())}"
                )
            named |= {name: zoo.get_config(name) for name in names}
        else:
            named[entry] = zoo.get_config(entry)
    return list(named.items())


def _bench_group(
    named: Sequence[tuple[str, ModelConfig]], batches: Sequence[int], conditions: Conditions
) -> list[Passport]:
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    memory: dict[tuple[str, int], int | None] = {}
    weights: dict[str, int] = {}
    best: dict[str, int] = {}
    proven: dict[str, bool] = {}
    configs = dict(named)
    with torch_threads(conditions.threads):
        for name, config in named:
            model: Any = zoo.build(config)
            weights[name] = weight_bytes(model) * DTYPES[conditions.precision].itemsize // 4
            model = as_measured(model, conditions)

            prepare = partial(call_of, model, config, conditions)
            best[name], proven[name] = saturating_batch(prepare, conditions.device)
            for batch in sorted({*batches, best[name]}):
                place = (name, batch)
                calls[place] = prepare(batch)
                calls[place]()
                memory[place] = working_memory(calls[place], conditions.device)
    labels = {f"{name} @ {batch}": (name, batch) for name, batch in calls}
    timings = measure(
        {label: calls[place] for label, place in labels.items()},
        device=conditions.device,
        threads=conditions.threads,
        clock=conditions.clock,
        rounds=conditions.rounds,
    )
    records = []
    for label, (name, batch) in labels.items():
        registered = zoo.is_model(name)
        records.append(
            passport(
                timings[label],
                model=name,
                config="" if registered else configs[name].to_json(),
                batch=batch,
                input=input_shape(configs[name], batch, tokens=conditions.tokens),
                saturating=proven[name] and batch == best[name],
                device=conditions.device,
                backend=conditions.backend if not conditions.fuse else f"{conditions.backend}, fused",
                precision=conditions.precision,
                memory_format=_memory_format(conditions),
                threads=conditions.threads,
                clock=conditions.clock,
                working_memory=memory[name, batch],
                weight_memory=weights[name],
                command=f"zoo bench {shlex.quote(name)} --batch {batch} {conditions.options}",
            )
        )
    return records


def _memory_format(conditions: Conditions) -> str:
    if conditions.in_engine:
        return "the engine's own"
    return "as fuse() chooses" if conditions.fuse else "contiguous"


def call_of(model: Any, config: ModelConfig, conditions: Conditions, batch: int) -> Callable[[], object]:
    """The call that is measured: of a model, in the form that :func:`as_measured` gave it, on noise of a batch."""
    x = example_input(config, batch, tokens=conditions.tokens, device=conditions.device)
    if conditions.in_engine:
        run = run_in_engine(model, (x,), conditions.job(batch))
        return partial(run, x)
    if x.is_floating_point():
        x = x.to(DTYPES[conditions.precision])

    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def saturating_batch(
    prepare: Callable[[int], Callable[[], object]], device: str = "cpu", *, at_most: int | None = None
) -> tuple[int, bool]:
    """The smallest power of two from which on twice the batch gives less than 5 % more throughput, twice in a row.

    Each batch is called three times, and the fastest call counts: this finds a batch, it measures nothing to quote.

    Args:
        prepare: Makes the call for a batch.
        device: Where it computes.
        at_most: No larger batch is tried, nor any after a call of two seconds, or one that fails, as for want of
            memory; 1,024 on CPUs and 4,096 elsewhere by default.

    Returns:
        The batch, and whether twice the batch was tried: if not, a larger one might give more.

    Raises:
        Exception: What a batch of 1 raises.
    """
    at_most = at_most or (1024 if torch.device(device).type == "cpu" else 4096)
    rates: dict[int, float] = {}
    batch = 1
    while batch <= at_most:
        try:
            seconds = _fastest(prepare(batch), device)
        except Exception:  # of memory, or of sizes that a library does not take
            if not rates:
                raise
            break
        rates[batch] = batch / seconds
        if batch >= 4 and max(rates[batch], rates[batch // 2]) < SATURATED * rates[batch // 4]:
            break
        if seconds > SLOW:
            break
        batch *= 2
    best = max(rates.values())
    found = next(batch for batch, rate in rates.items() if SATURATED * rate >= best)
    return found, 2 * found in rates


def _fastest(call: Callable[[], object], device: str) -> float:
    best = float("inf")
    for i in range(4):
        start = time.perf_counter()
        call()
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - start
        if i or seconds > SLOW:  # the first call may allocate, pack or compile
            best = min(best, seconds)
        if seconds > SLOW:
            break
    return best
