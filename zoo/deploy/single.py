"""One engine without a search: what ``zoo bench --backend`` measures. Nothing is compared, and nothing is isolated."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.deploy.engines import SOURCES, Job, Run, get_engine
from zoo.deploy.program import DTYPES, InDtype, capture, save_program
from zoo.errors import ConfigError


def check_engine(job: Job) -> None:
    """Raise ConfigError, with the reason, if an engine cannot be used as a job says."""
    engine = get_engine(job.engine)
    if job.precision == "int8":
        raise ConfigError("precision is 'int8', which needs pictures to calibrate with; expected zoo optimize for it.")
    note = engine.unavailable(job.target) or engine.refuses(job.precision, job.target)
    if note:
        raise ConfigError(f"{job.engine} cannot run in {job.precision} on {job.target}: {note}.")


def run_in_engine(model: nn.Module, example: tuple[Tensor, ...], job: Job) -> Run:
    """A model in eval mode as an engine runs it, for inputs of the example's shapes and dtypes.

    Args:
        model: In float32; the engine computes in the job's precision. It is moved to the job's target.
        example: Its inputs.
        job: Engine, precision, target and threads.

    Raises:
        ConfigError: If the engine cannot be used so here.
        ExportError: If the model cannot be exported.
    """
    check_engine(job)
    engine = get_engine(job.engine)
    program_in_precision = engine.source == "program" and job.precision != "fp32"
    module = InDtype(model, DTYPES[job.precision]) if program_in_precision else model
    module, example = module.to(job.target), tuple(x.to(job.target) for x in example)
    held = tempfile.TemporaryDirectory(prefix="zoo-engine-")
    folder = Path(held.name)
    with torch.no_grad():
        program = capture(module.eval(), example)
    source = save_program(program, folder / SOURCES[engine.source], onnx=engine.source == "onnx")
    (folder / "built").mkdir()
    engine.build(source, folder / "built", job)
    loaded = engine.load(folder / "built", job)

    def run(*inputs: Tensor) -> list[Tensor]:
        return loaded(*inputs)

    run.files = held  # type: ignore[attr-defined]  # which live as long as this
    return run
