"""What ``fast.save(path)`` writes, and when ``zoo.load_optimized(path)`` uses it again.

    manifest.json        engine, precision, target, threads, inputs; versions, machine, hashes; the report
    check.safetensors    an input, and what the engine answered to it when it was saved
    model.*              the engine's files; or, for a form of the module, its tensors

No file is a pickle. An artefact from another version or machine must answer the stored input as before, or it is
refused. Machine code (inductor's) runs only where it was built, for the user who built it; elsewhere it is built anew.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.analysis.benchmark import machine
from zoo.atomic import load_safetensors, save_safetensors, write_atomically
from zoo.deploy import forms
from zoo.deploy.engines import BUILT_HERE, Job, get_engine
from zoo.deploy.folder import MANIFEST, OPTIMISED
from zoo.deploy.program import tensors_of
from zoo.errors import ConfigError, ExportError, ZooError, reason
from zoo.factory import build, check_device
from zoo.pretrained.files import cache_folder, sha256_of
from zoo.registry import config_from_json, config_of

FORMAT = 1
CHECK, TENSORS = "check.safetensors", "model.safetensors"
_SAME = 1e-3  # relative rms within which a stored answer is the same on another machine, in any precision

_logger = logging.getLogger(__name__)


def save_artefact(
    path: Path,
    *,
    job: Job,
    report: dict[str, Any],
    example: tuple[Tensor, ...],
    outputs: Sequence[Tensor],
    single: bool,
    origin: dict[str, Any],
    files: Path | None,
    form: nn.Module | None,
) -> Path:
    """Write the folder as a whole or not at all; ``origin`` is what :func:`describe` says of the model.

    Raises:
        ExportError: If something else is at ``path``, or the model cannot be saved in this form.
    """
    if form is not None and not origin["config"]:
        raise ExportError(
            f"The fastest form is {job.engine!r}, which is saved as tensors for a model of the zoo; this is none, "
            f"and nothing could build it again. Optimise it with engines=['onnxruntime'], for example."
        )
    with OPTIMISED.written(path) as folder:
        for file in sorted(files.iterdir()) if files is not None else ():
            if file.name not in (MANIFEST, CHECK):
                shutil.copyfile(file, folder / file.name)
        if form is not None:
            save_tensors(form, folder / TENSORS)
            rebuild_form(folder, origin["config"], job)  # raises now rather than when somebody needs it
        inputs = {f"input.{i}": x.cpu().clone() for i, x in enumerate(example)}
        answers = {f"output.{i}": x.float().cpu().clone() for i, x in enumerate(outputs)}
        save_safetensors({**inputs, **answers}, folder / CHECK)
        manifest = {
            "format": FORMAT,
            "job": job.to_dict(),
            "single": single,
            "inputs": [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in example],
            **origin,
            "versions": versions(job),
            "machine": machine(),
            "files": {file.name: sha256_of(file) for file in sorted(folder.iterdir())},
            "report": report,
        }
        if files is not None and get_engine(job.engine).native and files.name == BUILT_HERE:
            _trust(manifest["files"])
        with write_atomically(folder / MANIFEST) as out:
            out.write(json.dumps(manifest, indent=2).encode())
    return path


def load_optimized(path: str | Path, *, rebuild: bool = False) -> Any:
    """A model that ``zoo.optimize(...).save(path)`` wrote.

    Args:
        path: The folder.
        rebuild: Build it again here, for the same engine, if it comes from another version or machine.

    Returns:
        What :func:`zoo.optimize` returns; its report is the one of the search that made it.

    Raises:
        ExportError: If the folder is not what it should be, has been changed, or cannot be used with these versions or
            on this machine; the message says what to do.
    """
    from zoo.deploy.optimize import Optimized, Report, Row

    path = Path(path)
    manifest = _read(path)
    try:
        job = Job(**manifest["job"])
        rows = [Row(**row) for row in manifest["report"].pop("candidates")]
    except (TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path / MANIFEST} is damaged: {reason(error)}. Optimise the model again.") from error
    stored = _verified(path, manifest)
    try:
        check_device(job.target)
    except ConfigError as error:
        raise ExportError(f"{path} was optimised for {job.target}. {error} Optimise the model here.") from error
    example = tuple(stored[f"input.{i}"].to(job.target) for i in range(len(manifest["inputs"])))
    differences = _differences(manifest, job)
    is_form = job.engine in forms.form_names()
    native = not is_form and get_engine(job.engine).native
    if differences and rebuild:
        return _rebuilt(path, manifest, job, example)
    if native and (differences or not _trusted(manifest["files"])):
        why = f"made with {' and '.join(differences)}" if differences else "machine code that was not built here"
        can = " load_optimized(path, rebuild=True) builds it from its tensors." if manifest["config"] else ""
        if differences or not manifest["config"]:
            raise ExportError(f"{path} is {why}, and its code does not run elsewhere. Optimise the model here.{can}")
        return _rebuilt(path, manifest, job, example)
    try:
        if is_form:
            module: nn.Module | None = rebuild_form(path, manifest["config"], job)
            assert module is not None
            run: Any = lambda *inputs: tensors_of(module(*inputs))  # noqa: E731
        else:
            module, run = None, get_engine(job.engine).load(path, job)
        with torch.inference_mode():
            outputs = run(*example)
    except ZooError:
        raise
    except Exception as error:
        made = f"; it was made with {' and '.join(differences)}" if differences else ""
        raise ExportError(f"{path}: {job.engine} cannot load it: {reason(error)}{made}.") from error
    for i, output in enumerate(outputs):
        before = stored[f"output.{i}"].double()
        distance = (output.double().cpu() - before).square().mean().sqrt() / before.square().mean().sqrt().clamp_min(
            1e-30
        )
        if not distance <= _SAME:
            made = f"It was made with {' and '.join(differences)}. " if differences else ""
            raise ExportError(f"{path} no longer answers as when it was saved. {made}Optimise the model again.")
    if differences:
        _logger.warning("%s was made with %s: it answers the same, its speed may be another", path, differences)
    report = Report(rows, manifest["report"])
    return Optimized(
        run,
        job,
        report,
        example,
        single=manifest["single"],
        origin={"config": manifest["config"], "model": manifest["model"]},
        files=None if is_form else path,
        model=module,
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """What an artefact says of the model that it came from; ``config`` is empty for one that zoo cannot build."""
    text = ""
    with contextlib.suppress(ConfigError, AttributeError):  # of no registered family, or no model of zoo's
        text = config_of(model).to_json()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    kept = ("architecture", "tag", "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "label_names")
    return {"config": text, "model": {key: cfg[key] for key in kept if key in cfg}}


def save_tensors(model: nn.Module, path: Path) -> None:
    """All that :func:`rebuild_form` needs besides the config."""
    save_safetensors({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)


def rebuild_form(folder: Path, config: str, job: Job) -> nn.Module:
    """A form of the module with the tensors that were saved.

    Raises:
        ExportError: If they do not fit what zoo builds from the config.
    """
    module = forms.make(job.engine, build(config_from_json(config)).eval(), job.precision)
    try:
        module.load_state_dict(load_safetensors(folder / TENSORS))
    except RuntimeError as error:
        raise ExportError(
            f"The tensors do not fit the model that zoo builds from its config ({reason(error)}): it was changed after "
            f"it was built, or zoo was. Optimise it with engines=['onnxruntime'], for example."
        ) from error
    return module.to(job.target).requires_grad_(False)


def _rebuilt(path: Path, manifest: dict[str, Any], job: Job, example: tuple[Tensor, ...]) -> Any:
    """The same engine and precision again, from the tensors."""
    from zoo.deploy.optimize import optimize

    if not manifest["config"] or not (path / TENSORS).is_file():
        raise ExportError(f"{path} holds no tensors of a model of the zoo to build from. Optimise the model here.")
    _logger.warning("%s is built again, since %s built it elsewhere", path, job.engine)
    form = job.engine if job.engine in forms.form_names() else "fused"
    module = rebuild_form(path, manifest["config"], Job(**{**job.to_dict(), "engine": form}))
    return optimize(module, example, job.target, job.precision, engines=[job.engine], threads=job.threads)


def _read(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found != FORMAT:
            raise ExportError(f"{path} has format {found}, of another version of zoo; this one reads {FORMAT}.")
        if not {"job", "single", "inputs", "config", "model", "versions", "machine", "files", "report"} <= set(
            manifest
        ):
            raise KeyError("entries")
    except FileNotFoundError as error:
        raise ExportError(f"{path} is not an optimised model: it has no {MANIFEST}.") from error
    except ZooError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file} is damaged: {reason(error)}. Optimise the model again.") from error
    return manifest


def _verified(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Check every file against its hash, and read the stored check."""
    for name, sha256 in manifest["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ExportError(f"{path} is not whole: {name} is missing. Optimise the model again.")
        if sha256_of(file) != sha256:
            raise ExportError(f"{file} is not what was saved: its hash differs. Optimise the model again.")
    return load_safetensors(path / CHECK)


def versions(job: Job) -> dict[str, str]:
    """What a saved candidate depends on."""
    found = {"zoo": zoo.__version__, "torch": torch.__version__}
    if job.engine not in forms.form_names():
        engine = get_engine(job.engine)
        found[engine.package] = engine.version()
    return found


def _differences(manifest: dict[str, Any], job: Job) -> list[str]:
    """In words, how here differs from where it was saved."""
    try:
        here = versions(job)
    except (metadata.PackageNotFoundError, ZooError):
        here = {"zoo": zoo.__version__, "torch": torch.__version__}
    found = [
        f"{name} {version} (here {here.get(name, 'not installed')})"
        for name, version in manifest["versions"].items()
        if here.get(name) != version
    ]
    there, own = manifest["machine"], machine()
    if there.get("id") != own["id"]:
        found.append(f"the machine {there.get('cpu')} (here {own['cpu']})")
    return found


def _trust(files: dict[str, str]) -> None:
    """Remember, in this user's cache, that this machine code was built here."""
    folder = cache_folder("built")
    folder.mkdir(parents=True, exist_ok=True)
    for sha256 in files.values():
        (folder / sha256).touch()


def _trusted(files: dict[str, str]) -> bool:
    return all((cache_folder("built") / sha256).is_file() for sha256 in files.values())
