"""zoo.optimize: the fastest form of a model on this machine that still answers the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis.benchmark import REST_S, Timing, compare, measure, torch_threads
from zoo.atomic import load_safetensors, save_safetensors
from zoo.config import ImageConfig, TextConfig
from zoo.deploy import forms
from zoo.deploy.artefact import TENSORS, describe, save_artefact, save_tensors
from zoo.deploy.engines import BUILT_HERE, CALIBRATION, SOURCES, Engine, Job, Run, engine_names, get_engine, place_of
from zoo.deploy.program import DTYPES, InDtype, capture, copy_for_inference, fused, save_program, tensors_of
from zoo.errors import ConfigError, ExportError, MissingExtraError, ShapeError, ZooError, nearest, reason
from zoo.factory import check_device
from zoo.registry import config_of

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
FP32_TOLERANCE = 1e-4  # relative: what reordering sums may change
TF32_TOLERANCE = 2e-3  # and on a GPU, where PyTorch by default lets convolutions round to ten bits
TF32_AT_MOST = 0.1  # for any model, however much of that rounding it makes
_CHECKED = (16, 64)  # pictures, at least and at most, that every candidate answers before it counts:
_CHECK_S = 1.0  # as many as the model itself answers in so many seconds
_MEASURED_SHARE = 0.25  # of the time limit, kept for measuring:
_ROUNDS_SHARE = 0.5  # of what is left then, for the rounds:
_WARM_SHARE = 0.3  # and for a warm-up before them
_WRITTEN = 16  # tokens that a language model writes in a measured call on a GPU
_POLL_S = 0.05  # between looks at what builds in the background
_WARM_S = 0.5  # from how many seconds on one call is warm-up enough
_HOPELESS = 1.3  # times as slow in a first turn as another, which later turns will hardly make good
_TURN = 0.1  # seconds in which a candidate is called again and again, at least once


@dataclass(kw_only=True)
class Row:
    """One candidate, or why it is none. Times in milliseconds."""

    engine: str
    precision: str
    status: str = "skipped"  # "chosen", "slower", "wrong", "failed", "skipped"; "passed" until it is measured
    latency_ms: float | None = None  # median; of a single turn where ``rounds`` is 1
    low_ms: float | None = None  # quartiles
    high_ms: float | None = None
    speedup: float | None = None  # over the model as it was given, median of the rounds' ratios
    rounds: int = 0  # in which it was timed
    error: float | None = None  # rms of the difference to the original's outputs, over their rms
    agreement: float | None = None  # share of the checked inputs with the same likeliest class
    build_s: float | None = None
    note: str = ""


@dataclass
class Report:
    """What was tried, what came of it, and why the choice is what it is. ``print(report)`` shows a table."""

    rows: list[Row]
    facts: dict[str, Any]

    @property
    def chosen(self) -> Row:
        """The candidate that won."""
        return next(row for row in self.rows if row.status == "chosen")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.facts, "candidates": [asdict(row) for row in self.rows]}

    @property
    def explanation(self) -> str:
        """The choice in a sentence or two."""
        best = self.chosen
        others = [row for row in self.rows if row.status == "slower" and row.engine != "eager"]
        text = f"{best.engine} in {best.precision}: {best.latency_ms:.2f} ms"
        if best.engine == "eager":
            text += ", and nothing that was tried is faster than the model as it is."
        else:
            text += f", {best.speedup:.2f} times as fast as the model as it was given."
        if others:
            second = min(others, key=lambda row: row.latency_ms or 0.0)
            assert second.latency_ms is not None
            assert best.high_ms is not None
            assert second.low_ms is not None
            close = " (within the spread of this measurement)" if second.low_ms <= best.high_ms else ""
            text += f" Next: {second.engine} in {second.precision}, {second.latency_ms:.2f} ms{close}."
        return f"{text} Checked on {self.facts['checked']}."

    def __str__(self) -> str:
        from zoo.cli._output import console

        out = console()
        with out.capture() as captured:
            out.print(self.table())
        return f"{captured.get().rstrip()}\n\n{self.explanation}"

    def table(self) -> Any:
        """The rows as a rich table."""
        from rich.markup import escape

        from zoo.cli._output import table

        grid = table("engine", "precision", "", ">ms", ">spread", ">x", ">error", ">top-1 same", ">build (s)", "note")
        for row in self.rows:
            spread = None if row.latency_ms is None else f"{row.low_ms:.2f}-{row.high_ms:.2f}"
            grid.add_row(
                row.engine,
                row.precision,
                row.status,
                _show(row.latency_ms, ".2f"),
                spread or "-",
                _show(row.speedup, ".2f"),
                _show(row.error, ".1e"),
                _show(row.agreement, ".1%"),
                _show(row.build_s, ".1f"),
                escape(row.note),
            )
        return grid


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


class Optimized:
    """A model in its fastest form; called as the model, with inputs of the example's shapes and dtypes.

    Attributes:
        report: What was tried, and why this was chosen.
        job: What runs: engine, precision, target, threads.
    """

    def __init__(
        self,
        run: Run,
        job: Job,
        report: Report,
        example: tuple[Tensor, ...],
        *,
        single: bool,
        origin: dict[str, Any],
        files: Path | None = None,
        model: nn.Module | None = None,
        held: Any = None,
    ) -> None:
        self.report = report
        self.job = job
        self.shapes = [(tuple(x.shape), x.dtype) for x in example]
        self.single = single
        self._run = run
        self._example = example
        self._files = files
        self._model = model  # of a form
        self._origin = origin
        self._held = held  # a temporary folder, which lives as long as this

    @property
    def model(self) -> nn.Module:
        """The module that runs: a language model's has ``generate``.

        Raises:
            ConfigError: If another runtime than torch was chosen, which has none.
        """
        if self._model is None:
            raise ConfigError(
                f"{self.job.engine} runs a program and no module; optimise with engines={forms.form_names()} for one."
            )
        return self._model.model if isinstance(self._model, InDtype) else self._model

    def generate(self, *args: Any, **options: Any) -> Any:
        """``generate`` of a language model's :attr:`model`; see transformers.

        Raises:
            ConfigError: If there is none.
        """
        model: Any = self.model
        if not hasattr(model, "generate"):
            raise ConfigError(f"{type(model).__name__} writes no text; expected a language model.")
        return model.generate(*args, **options)

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's answer: a tensor, or a list of tensors where the model gives several.

        Raises:
            ShapeError: For inputs that are not like the example; a language model that is a module takes any tokens.
        """
        got = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        if got != self.shapes and not (self._model is not None and hasattr(self.model, "generate")):
            raise ShapeError(
                f"The input is {_describe(got)}; this was optimised for {_describe(self.shapes)}. "
                f"Optimise it with an example like the input, for another batch or size."
            )
        with torch.inference_mode():
            outputs = self._run(*inputs)
        return outputs[0] if self.single else outputs

    def save(self, path: str | Path) -> Path:
        """Write a folder that :func:`zoo.load_optimized` reads; see docs/export.md for what is in it.

        Raises:
            ExportError: If there is something else at ``path``, or this form of the model cannot be saved.
        """
        return save_artefact(
            Path(path),
            job=self.job,
            report=self.report.to_dict(),
            example=self._example,
            outputs=self._run(*self._example),
            single=self.single,
            origin=self._origin,
            files=self._files,
            form=self._model,
        )

    def __repr__(self) -> str:
        return f"<Optimized: {self.job.engine}, {self.job.precision}, {_describe(self.shapes)} on {self.job.target}>"


def _describe(shapes: Sequence[Any]) -> str:
    shown = [
        f"{list(each[0])} {str(each[1]).removeprefix('torch.')}" if isinstance(each, tuple) else each for each in shapes
    ]
    return " and ".join(shown) or "nothing"


def optimize(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...] | None = None,
    target: str = "cpu",
    precision: str | Sequence[str] = "auto",
    tolerance: float = 1e-2,
    *,
    pictures: Tensor | None = None,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    time_limit: float = 60.0,
    rounds: int = 9,
) -> Optimized:
    """Try the ways of running a model that are installed, and return the fastest that still answers the same.

    Each engine's candidate is built, loaded and run on all checks in a process of its own, under a time limit; what
    fails, crashes, takes too long or answers differently is a line of the report. Those that pass, and no others, are
    loaded here, to be measured in turns, or, when time is short and others are far quicker, timed once; the fastest
    stays, in this process, as any call of its engine would be. The model itself stays as it is.

    Args:
        model: Any module whose inputs and outputs are tensors.
        example: Its input, or inputs, in the shapes and dtypes that are to be fast; for an image model of the zoo, one
            picture of its nominal size by default. A language model needs none: it is then tried on a short prompt, in
            the forms that can still generate.
        target: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``, or several, are tried besides fp32; ``"auto"`` is
            fp32, bf16 where the target computes in it, and int8 where there are pictures to calibrate with.
        tolerance: The most that the rms of the difference to the original's outputs may be, over the rms of those
            outputs. fp32 must be within 1e-4, whatever is given. On a GPU, where PyTorch by default lets convolutions
            round to ten bits (TF32), those outputs are computed without that, and fp32 must be within 2e-3. Nothing
            has to be nearer there than twice what the model itself is off by with TF32, up to 0.1.
        pictures: Real inputs ``[N, ...]``, preprocessed, to check on and to calibrate int8 with: a few dozen or more.
            16 to 64 of them are checked on, as time allows, or a batch; as many calibrate as the time limit has
            seconds, or two batches. Without, candidates are checked on noise, which says little about int8.
        engines: Names of engines and forms to try; all by default.
        threads: Of the CPU; torch's number by default.
        time_limit: Seconds that building, checking and measuring may take together. Inductor, which compiles for
            minutes, is tried from 300 on, or when ``engines`` names it.
        rounds: Of the measurement.

    Raises:
        ConfigError: If target, precision or an engine is not there.
        ShapeError: If the model does not take the example.
        ExportError: If it returns something else than tensors, or answers differently each time.

    Examples:
        >>> fast = zoo.optimize(model, example, target="cpu", precision="auto", tolerance=1e-2)
        >>> fast(example); print(fast.report); fast.save("m5_cpu")
        >>> packed = zoo.optimize(zoo.create_model("matmulfree_370m"), target="cpu")
        >>> packed.generate(tokens); packed.model
    """
    deadline = time.monotonic() + time_limit
    check_request(target, precision, engines)
    asked = _precisions(precision, pictures is not None)
    names, named = engines, engines is not None or precision != "auto"
    inputs = _as_example(model, example)
    prompted = example is None and not inputs[0].is_floating_point()
    if prompted and names is None:
        names = forms.form_names()  # a program has no cache to go on from
    threads = threads or torch.get_num_threads()
    device = torch.device(target)
    original = copy_for_inference(model).to(device)
    inputs = tuple(x.to(device) for x in inputs)
    checks = _checks(inputs, pictures, device)
    with in_full_fp32() if device.type == "cuda" else contextlib.nullcontext():
        expected, single = _expected(original, inputs, checks, all_of_them=pictures is None)
    checks = checks[: len(expected)]
    given = [_answers(original, each) for each in checks] if device.type == "cuda" else expected

    held = tempfile.TemporaryDirectory(prefix="zoo-optimize-")
    search = _Search(
        named=named,
        engines_named=engines is not None,
        time_limit=time_limit,
        model=original,
        folder=Path(held.name),
        target=target,
        threads=threads,
        checks=checks,
        expected=expected,
        given=given,
        tolerance=tolerance,
        deadline=deadline - _MEASURED_SHARE * time_limit,
        pictures=pictures,
    )
    candidates = search.run(names, asked)
    if not any(row.engine == "eager" for row in search.rows):
        search.try_form("eager", "fp32")  # what the others are compared with
        candidates = search.candidates
    writes = prompted and device.type == "cuda"  # where forms differ in what a step costs beside the arithmetic
    calls = {
        key: _writing(candidate.model, inputs) if writes and candidate.model else _call(candidate.run, inputs)
        for key, candidate in candidates.items()
    }
    if writes:
        for call in calls.values():
            call()  # what it records or compiles: the checks read, and wrote nothing
    allowed = [key for key in calls if names is None or candidates[key].row.engine in names] or list(calls)
    rows = {key: candidate.row for key, candidate in candidates.items()}
    timings = _measure(calls, rows, allowed, target=target, threads=threads, rounds=rounds, until=deadline)
    best = min(set(allowed) & set(timings), key=lambda key: timings[key].median)
    chosen = candidates[best]
    chosen.row.status = "chosen"
    origin = describe(model)
    if chosen.files is not None and origin["config"] and get_engine(chosen.job.engine).native:
        save_tensors(fused(original), chosen.files / TENSORS)  # to build from elsewhere
    facts = {
        "target": target,
        "threads": threads,
        "measured": f"reading {inputs[0].shape[1]} tokens and writing {_WRITTEN}" if writes else "a call",
        "inputs": [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in inputs],
        "tolerance": tolerance,
        "checked": _checked_on(checks, pictures),
        "search_s": round(time_limit - (deadline - time.monotonic()), 1),
    }
    return Optimized(
        chosen.run,
        chosen.job,
        Report(sorted(search.rows, key=_rank), facts),
        inputs,
        single=single,
        origin=origin,
        files=chosen.files,
        model=chosen.model,
        held=held if chosen.files is not None else None,
    )


def _measure(
    calls: dict[str, Callable[[], None]],
    rows: dict[str, Row],
    allowed: Sequence[str],
    *,
    target: str,
    threads: int,
    rounds: int,
    until: float,
) -> dict[str, Timing]:
    """Time calls in turns, in as many rounds as there is time for, three at least; it goes into their rows.

    Where there is no time for three, what is far slower in a first turn than one that is allowed to win has that alone.
    """
    conditions: Any = {"device": target, "threads": threads, "turn_s": _TURN}
    firsts = {key: timing.median for key, timing in measure(calls, rounds=1, warmup_s=0.0, **conditions).items()}
    left = max(0.0, until - time.monotonic())
    if _ROUNDS_SHARE * left < 3 * _round(firsts.values()):
        enough = _HOPELESS * min(firsts[key] for key in allowed)
        for key in [key for key, seconds in firsts.items() if seconds > enough and key != "eager fp32"]:
            row = rows[key]
            row.latency_ms = row.low_ms = row.high_ms = 1e3 * firsts[key]
            row.speedup = firsts["eager fp32"] / firsts[key]
            row.status, row.rounds, row.note = "slower", 1, "timed once: there was no time for more"
        calls = {key: call for key, call in calls.items() if rows[key].status != "slower"}
    once = _round(firsts[key] for key in calls)
    warm = once > _WARM_S * len(calls)  # by that first turn; otherwise some, even when no time is left
    timings = measure(
        calls,
        **conditions,
        rounds=max(3, min(rounds, int(_ROUNDS_SHARE * left / once))),
        warmup_s=0.0 if warm else min(1.0, max(2 * _TURN, _WARM_SHARE * left / len(calls))),
    )
    for key, timing in timings.items():
        row, (low, high) = rows[key], timing.quartiles
        row.latency_ms, row.low_ms, row.high_ms = 1e3 * timing.median, 1e3 * low, 1e3 * high
        row.speedup = compare(timing, timings["eager fp32"]).median
        row.status, row.rounds = "slower", len(timing.rounds)
    return timings


def _round(calls: Iterable[float]) -> float:
    """Seconds of a round of calls of so many seconds each; a warm-up begins with as many."""
    return sum(max(seconds, _TURN) + REST_S for seconds in calls)


@dataclass(kw_only=True)
class _Candidate:
    row: Row
    job: Job
    run: Run
    files: Path | None = None
    model: nn.Module | None = None


class _Search:
    """Building and checking of all candidates, several at a time."""

    def __init__(
        self,
        *,
        named: bool,
        engines_named: bool,
        time_limit: float,
        model: nn.Module,
        folder: Path,
        target: str,
        threads: int,
        checks: list[tuple[Tensor, ...]],
        expected: list[list[Tensor]],
        given: list[list[Tensor]],
        tolerance: float,
        deadline: float,
        pictures: Tensor | None,
    ) -> None:
        self.named = named  # whether the caller said what to try, and hears of all that could not be
        self.engines_named = engines_named
        self.time_limit = time_limit
        self.model = model
        self.folder = folder
        self.target = target
        self.threads = threads
        self.checks = checks
        self.expected = expected  # in full fp32
        self.given = given  # what the model answers as it is: on a GPU perhaps with TF32
        self.own_error = 0.0 if given is expected else _error(given, expected)
        self.tolerance = tolerance
        self.deadline = deadline
        self.pictures = pictures
        self.rows: list[Row] = []
        self.candidates: dict[str, _Candidate] = {}
        self._building: list[_Worker] = []
        self._notable: set[str] = set()  # why something was skipped, worth saying unasked
        self._programs: dict[str, torch.export.ExportedProgram | ExportError] = {}
        self._sources: dict[tuple[str, str], Path | ZooError] = {}

    def run(self, names: Sequence[str] | None, precisions: Sequence[str]) -> dict[str, _Candidate]:
        """Try everything; what passed, by name."""
        self._write_inputs()
        # The slowest to build goes first, into the background; the forms are tried while the others build.
        engines = sorted((name for name in engine_names() if names is None or name in names), key=_build_time)
        try:
            for name in engines:
                for precision in precisions:
                    if worker := self._start(name, precision):
                        self._building.append(worker)
            for precision in precisions:  # fp32 first: the others are compared with it
                for name in forms.form_names():
                    if names is None or name in names:
                        self.try_form(name, precision)
                        self._finish(wait=False)
            self._finish(wait=True)
        finally:  # an interrupt does not reach processes of another session
            for worker in self._building:
                worker.stop()
        if not self.named:
            self.rows = [row for row in self.rows if row.status != "skipped" or row.note in self._notable]
        return self.candidates

    def _finish(self, *, wait: bool) -> None:
        """Load and check what is built, as soon as it is, so that little is left to load when the time is over."""
        while self._building:
            over = time.monotonic() > self.deadline
            done = [worker for worker in self._building if over or not worker.alive]
            for worker in done:
                worker.finish(self)
                self._building.remove(worker)  # not before: an interrupt must find it
            if not wait:
                return
            if not done:
                time.sleep(_POLL_S)

    def try_form(self, name: str, precision: str) -> None:
        """Make a form of the model, in this process, and check it."""
        row = self._row(name, precision)
        row.note = forms.refuses(name, self.model, precision, self.target)
        if row.note:
            return
        try:
            start = time.perf_counter()
            made = forms.make(name, self.model, precision)
            row.build_s = time.perf_counter() - start

            def run(*inputs: Tensor) -> list[Tensor]:
                return tensors_of(made(*inputs))

            if (name, precision) == ("eager", "fp32"):
                answers = self.given  # it is the model itself
            else:
                answers = []
                # More threads than cores wait for each other far longer than they compute.
                share = max(1, self.threads // (1 + sum(worker.alive for worker in self._building)))
                with torch.inference_mode(), torch_threads(share):
                    for inputs in self.checks:
                        if time.monotonic() > self.deadline:
                            row.status, row.note = "failed", "was not checked before its time was over"
                            return
                        answers.append(run(*inputs))
        except Exception as error:
            row.status, row.note = "failed", reason(error)
            return
        if self.agrees(row, answers):
            job = self._job(name, precision)
            self.candidates[f"{name} {precision}"] = _Candidate(row=row, job=job, run=run, model=made)

    def agrees(self, row: Row, answers: Sequence[Sequence[Tensor]]) -> bool:
        """Compare a candidate's answers with the original's, and note how far apart they are."""
        shapes = [[list(each.shape) for each in answer] for answer in answers]
        if shapes != [[list(each.shape) for each in answer] for answer in self.expected]:
            row.status, row.note = "wrong", "its outputs have other shapes"
            return False
        row.error = _error(answers, self.expected)
        limit = error_limit(row.precision, self.target, self.tolerance, self.own_error)
        first = [(answer[0], expected[0]) for answer, expected in zip(answers, self.expected, strict=True)]
        if all(ours.ndim == 2 and ours.shape[1] > 1 for ours, _ in first):
            same = torch.cat([(ours.cpu().argmax(1) == theirs.cpu().argmax(1)).float() for ours, theirs in first])
            row.agreement = float(same.mean())
        itself = answers is self.given  # and passes, whatever TF32 costs it
        if not itself and not row.error <= limit:  # also when it is not a number
            row.status, row.note = "wrong", f"differs by more than {limit:g}"
            return False
        row.status = "passed"
        return True

    def _start(self, name: str, precision: str) -> "_Worker | None":
        """Start building with an engine; None, with a line in the report, where that cannot be."""
        row = self._row(name, precision)
        try:
            engine = get_engine(name)
            row.note = engine.unavailable(self.target)
            if row.note and precision == "fp32":
                self._notable.add(row.note)
            row.note = row.note or engine.refuses(precision, self.target) or self._too_slow(engine, precision)
            if not row.note and precision == "int8":
                row.note = self._no_calibration()
            if not row.note and time.monotonic() > self.deadline:
                row.note = "no time was left"
            if row.note:
                return None
            of = precision if engine.source == "program" and precision in DTYPES else "fp32"
            source = self._source(engine.source, of)
        except MissingExtraError as error:
            row.note = str(error)
            return None
        except (ZooError, ImportError, OSError, RuntimeError) as error:
            row.status, row.note = "failed", reason(error)
            return None
        return _Worker(row, self._job(name, precision), source, self)

    def _too_slow(self, engine: Engine, precision: str) -> str:
        if self.engines_named or self.time_limit >= engine.patience:
            return ""
        note = f"compiles for minutes: tried with a time limit of {engine.patience:g} s or more, or when it is named"
        if precision == "fp32":
            self._notable.add(note)
        return note

    def _no_calibration(self) -> str:
        if self.pictures is None:
            return "needs pictures to calibrate with"
        if len(self.checks[0]) > 1:
            return "calibration is for models with one input"
        batch = self.checks[0][0].shape[0]
        return "" if len(self.pictures) >= batch else f"needs {batch} pictures or more to calibrate with"

    def _source(self, kind: str, precision: str) -> Path:
        key = (kind, precision)
        if key not in self._sources:
            try:
                self._sources[key] = self._write_source(kind, precision)
            except ZooError as error:
                self._sources[key] = error
        found = self._sources[key]
        if isinstance(found, ZooError):
            raise found
        return found

    def _write_source(self, kind: str, precision: str) -> Path:
        program = self._program(precision)
        path = self.folder / f"{precision}-{SOURCES[kind]}"
        names = ["input", *(f"input_{i}" for i in range(1, len(self.checks[0])))]
        outputs = ["logits", *(f"output_{i}" for i in range(1, len(self.expected[0])))]
        return save_program(program, path, onnx=kind == "onnx", input_names=names, output_names=outputs)

    def _program(self, precision: str) -> torch.export.ExportedProgram:
        if precision not in self._programs:
            module = fused(self.model)
            if precision != "fp32":
                module = InDtype(module, DTYPES[precision])
            try:
                self._programs[precision] = capture(module, self.checks[0])
            except ExportError as error:
                self._programs[precision] = error
        found = self._programs[precision]
        if isinstance(found, ExportError):
            raise found
        return found

    def _write_inputs(self) -> None:
        tensors = {f"{i}.{k}": x.cpu().clone() for i, inputs in enumerate(self.checks) for k, x in enumerate(inputs)}
        save_safetensors(tensors, self.folder / "inputs.safetensors")
        if self.pictures is not None:
            import numpy as np

            most = max(2 * self.checks[0][0].shape[0], int(self.time_limit))
            spread = self.pictures[:: max(1, len(self.pictures) // most)][:most]  # they may be sorted by class
            np.save(self.folder / CALIBRATION, spread.float().numpy(), allow_pickle=False)

    def _job(self, name: str, precision: str) -> Job:
        batch = self.checks[0][0].shape[0] if self.checks[0][0].ndim else 1
        return Job(engine=name, precision=precision, target=self.target, threads=self.threads, batch=batch)

    def _row(self, name: str, precision: str) -> Row:
        row = Row(engine=name, precision=precision)
        self.rows.append(row)
        return row


class _Worker:
    """A process that builds and checks one candidate."""

    def __init__(self, row: Row, job: Job, source: Path, search: _Search) -> None:
        self.row = row
        self.job = job
        self.folder = search.folder / f"{job.engine}-{job.precision}"
        self.files = self.folder / BUILT_HERE
        self.files.mkdir(parents=True)
        work = {
            "job": job.to_dict(),
            "place": place_of(job.engine),
            "source": str(source),
            "inputs": str(search.folder / "inputs.safetensors"),
            "checks": len(search.checks),
            "arity": len(search.checks[0]),
        }
        (self.folder / "job.json").write_text(json.dumps(work), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (self.folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "zoo.deploy.worker", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a group of its own, with the compilers that it starts
            )

    def finish(self, search: _Search) -> None:
        """Load and check what it built, unless it is still at it: then its time is over."""
        row = self.row
        if self.alive:
            self.stop()
            row.status, row.note = "failed", "was not built before its time was over"
            return
        result = self.folder / "result.json"
        if not result.is_file():
            row.status, row.note = "failed", f"its process crashed ({_signal(self._process.returncode)})"
            return
        answer = json.loads(result.read_text(encoding="utf-8"))
        if "error" in answer:
            row.status, row.note = "failed", answer["error"]
            return
        row.build_s = answer["build_s"]
        stored = load_safetensors(self.folder / "outputs.safetensors")
        answers = [
            [stored[f"{i}.{k}"] for k in range(len(expected)) if f"{i}.{k}" in stored]
            for i, expected in enumerate(search.expected)
        ]
        if not search.agrees(row, answers):
            return
        try:
            run = get_engine(self.job.engine).load(self.files, self.job)
            _call(run, search.checks[0])()  # what is recorded at the first call may fail as well
        except Exception as error:
            row.status, row.note = "failed", reason(error)
            return
        key = f"{row.engine} {row.precision}"
        search.candidates[key] = _Candidate(row=row, job=self.job, run=run, files=self.files)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End it, and what it has started, unless it is done."""
        if not self.alive:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _build_time(name: str) -> int:
    return 0 if get_engine(name).source == "program" else 1


def _rank(row: Row) -> tuple[bool, float]:
    """The measured ones first, quickest first."""
    return row.latency_ms is None, row.latency_ms or 0.0


def _call(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            run(*inputs)

    return call


def _writing(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """What a language model is for: reading a prompt and writing on from it."""
    writer: Any = model.model if isinstance(model, InDtype) else model
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": _WRITTEN}

    def call() -> None:
        with torch.inference_mode():
            writer.generate(inputs[0], **options)

    return call


def check_request(target: str, precision: str | Sequence[str], engines: Sequence[str] | None) -> None:
    """Raise ConfigError if target, precision or an engine is not there."""
    check_device(target)
    given = [] if precision == "auto" else [precision] if isinstance(precision, str) else precision
    for each in given:
        if each not in PRECISIONS:
            raise ConfigError(
                f"precision is {each!r}; expected 'auto' or {', '.join(PRECISIONS)}.{nearest(each, PRECISIONS)}"
            )
    known = [*forms.form_names(), *engine_names()]
    for name in engines or ():
        if name not in known:
            raise ConfigError(f"There is no engine {name!r}; there are {', '.join(known)}.{nearest(name, known)}")


def _precisions(precision: str | Sequence[str], pictures: bool) -> list[str]:
    if precision == "auto":
        return ["fp32", "bf16", *(["int8"] if pictures else [])]
    given = [precision] if isinstance(precision, str) else precision
    return ["fp32", *(each for each in PRECISIONS if each in given and each != "fp32")]


def _is_language_model(model: nn.Module) -> bool:
    try:
        return isinstance(config_of(model), TextConfig)
    except AttributeError:
        return False


def _as_example(model: nn.Module, example: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    config = getattr(model, "config", None)
    if example is None and _is_language_model(model):
        example = torch.arange(16)[None] % config_of(model).vocab_size  # type: ignore[attr-defined]
    elif example is None:
        if not isinstance(config, ImageConfig):
            raise ConfigError("example is None; expected an input of the model, as it is no model of the zoo.")
        example = torch.randn(1, config.in_chans, *config.input_hw, generator=torch.Generator().manual_seed(0))
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise ShapeError(f"example has a {type(x).__name__}; expected a tensor, or a tuple of tensors.")
        if x.dtype in (torch.float64, torch.bfloat16, torch.float16):
            raise ShapeError(f"example is {x.dtype}; expected torch.float32: `precision` says what to compute in.")
    if isinstance(config, ImageConfig):
        x = inputs[0]
        if x.ndim != 4 or x.shape[1] != config.in_chans or not x.is_floating_point() or len(inputs) != 1:
            got = _describe([(tuple(each.shape), each.dtype) for each in inputs])
            height, width = config.input_hw
            raise ShapeError(
                f"example is {got}; expected [batch, {config.in_chans}, {height}, {width}] float32 "
                f"or another height and width."
            )
    return inputs


def _checks(example: tuple[Tensor, ...], pictures: Tensor | None, device: torch.device) -> list[tuple[Tensor, ...]]:
    """What every candidate must answer: pictures in batches of the example's size, or the example and noise."""
    first = example[0]
    if pictures is not None:
        if len(example) != 1 or pictures.shape[1:] != first.shape[1:] or pictures.dtype != first.dtype:
            got, wanted = ([*each.shape[1:]] for each in (pictures, first))
            raise ShapeError(
                f"pictures are [N, {str(got)[1:-1]}] {pictures.dtype}; expected [N, {str(wanted)[1:-1]}] "
                f"{first.dtype}, as the example."
            )
        batch = first.shape[0]
        whole = min(max(_CHECKED[1] // batch, 1), len(pictures) // batch) * batch
        if not whole:
            raise ShapeError(f"There are {len(pictures)} pictures; expected at least {batch}, the example's batch.")
        return [(x.to(device),) for x in pictures[:whole].split(batch)]
    generator = torch.Generator().manual_seed(1)
    checks = [example]
    if all(x.is_floating_point() for x in example):
        for _ in range(2):
            checks.append(tuple(torch.randn(x.shape, generator=generator).to(device) for x in example))
    return checks


def _checked_on(checks: Sequence[tuple[Tensor, ...]], pictures: Tensor | None) -> str:
    return f"{_samples(checks)} {'inputs of the example and noise' if pictures is None else 'pictures'}"


def _samples(checks: Sequence[tuple[Tensor, ...]]) -> int:
    return sum(inputs[0].shape[0] if inputs[0].ndim else 1 for inputs in checks)


def error_limit(precision: str, target: str, tolerance: float, own: float) -> float:
    """The most that a candidate may be off, where the model itself, with TF32, is off by ``own``."""
    limit = tolerance
    if precision == "fp32":
        limit = min(TF32_TOLERANCE if target.startswith("cuda") else FP32_TOLERANCE, tolerance)
    # Two computations with TF32 are both off, each its own way, and by how much depends on the model.
    return max(limit, min(2 * own, TF32_AT_MOST))


@contextlib.contextmanager
def in_full_fp32() -> Iterator[None]:
    """Without TF32 on GPUs. What was PyTorch's default is set to the same explicitly afterwards: it cannot be unset."""
    backends: Any = torch.backends
    switches = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [each.fp32_precision for each in switches]
    for each in switches:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, precision in zip(switches, before, strict=True):
            each.fp32_precision = precision


@torch.inference_mode()
def _answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return tensors_of(model(*inputs))


def _refuse_not_finite(outputs: Sequence[Tensor], of: str) -> None:
    if not all(bool(each.isfinite().all()) for each in outputs):
        raise ExportError(f"The model's answer to {of} is not finite, so that nothing can be checked.")


def _error(answers: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """Rms of the difference, over the rms of what is expected."""
    pairs = [
        (ours.double().cpu(), theirs.double().cpu())
        for ours_of, theirs_of in zip(answers, expected, strict=True)
        for ours, theirs in zip(ours_of, theirs_of, strict=True)
    ]
    difference = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
    scale = sum(float(theirs.square().sum()) for _, theirs in pairs)
    return (difference / scale) ** 0.5 if scale else difference**0.5


def _expected(
    original: nn.Module, example: tuple[Tensor, ...], checks: Sequence[tuple[Tensor, ...]], *, all_of_them: bool
) -> tuple[list[list[Tensor]], bool]:
    """What the model itself answers to the checks, or to as many as time allows; and whether that is one tensor."""
    with torch.inference_mode():
        try:
            output = original(*example)
        except Exception as error:
            got = _describe([(tuple(x.shape), x.dtype) for x in example])
            raise ShapeError(f"The model does not take the example, {got}: {reason(error)}.") from error
        first, again = tensors_of(output), tensors_of(original(*example))
        for one, other in zip(first, again, strict=True):
            if not torch.equal(one.nan_to_num(), other.nan_to_num()) and not torch.allclose(one, other, 1e-4, 1e-4):
                raise ExportError("The model answers differently each time, so that nothing can be checked against it.")
        _refuse_not_finite(first, "the example")
        answers: list[list[Tensor]] = []
        start = time.monotonic()
        for inputs in checks:
            enough = _samples(checks[: len(answers)]) >= _CHECKED[0] and time.monotonic() - start > _CHECK_S
            if enough and not all_of_them:
                break
            answers.append(_answers(original, inputs))
            _refuse_not_finite(answers[-1], f"check {len(answers)}")
    return answers, isinstance(getattr(output, "logits", output), Tensor)
