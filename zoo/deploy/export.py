"""zoo.export: a model as a file of another runtime, run again there before it counts."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.atomic import write_atomically
from zoo.config import ImageConfig
from zoo.deploy.folder import EXPORTED, MANIFEST
from zoo.deploy.formats import Format, get_format, notes_of
from zoo.deploy.program import copy_for_inference, fused
from zoo.deploy.source import Shipped, load_for_shipping
from zoo.errors import ConfigError, ExportError, reason
from zoo.preprocessing import Preprocessing
from zoo.pretrained.files import sha256_of

TOLERANCE = 1e-4  # of max(1, std of the outputs): the most that a file may differ from eager
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Check:
    """One comparison of the file, in its own runtime, with the model."""

    input: tuple[int, ...]
    max_abs: float
    scale: float  # max(1, std) of the model's outputs
    top1_same: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.max_abs <= TOLERANCE * self.scale  # False for NaN


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The model's file.
        manifest: What ``manifest.json`` beside it says.
        snippet: Lines of Python that run it.
    """

    path: Path
    manifest: dict[str, Any]
    snippet: str

    @property
    def verified(self) -> bool:
        """Whether the file was run in its own runtime; Core ML's is on macOS alone."""
        return bool(self.manifest["checks"])


class PixelInput(nn.Module):
    """A model whose input is pixels of 0 to 255, any dtype: scaling and normalising are inside."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.float() * self.scale + self.shift)


def export(
    model: str | nn.Module,
    format: str = "onnx",
    out: str | Path | None = None,
    *,
    img_size: int | None = None,
    free_size: bool = False,
    pixels: bool = False,
    random_weights: bool = False,
) -> Exported:
    """Write a model for another runtime, and run the file there, at three batch sizes, before it counts.

    Batch norms are folded and layers merged first. Beside the file lies ``manifest.json``: input, preprocessing,
    labels, hashes, versions and what was checked; the file's own metadata has the same where the format has a place.

    Args:
        model: A name, a run folder or a place, as ``zoo predict`` takes them; or an image model of the zoo.
        format: ``"onnx"``, ``"openvino"``, ``"torch-export"``, ``"torchscript"``, ``"executorch"`` or ``"coreml"``.
        out: Folder to write; ``NAME-FORMAT`` by default.
        img_size: Side in pixels to build a named model for; its own by default.
        free_size: One file for every height and width. It is run at three other sizes, one of them not square.
        pixels: Put scaling and normalising into the file: its input is pixels of 0 to 255, float32, already resized.
        random_weights: Take a named model without weights, to try things out.

    Raises:
        ConfigError: If there is no such format, or it cannot do what is asked.
        WeightsError: If there are no weights and random ones were not asked for.
        MissingExtraError: Without the format's packages.
        ExportError: If the model cannot be converted, or the file answers differently; nothing is written then.
    """
    kind = get_format(format)
    if free_size and not kind.free_size:
        raise ConfigError(f"A file for {format} has one size of input; expected no free size.")
    kind.require()
    shipped = _shipped(model, img_size, random_weights)
    original = copy_for_inference(shipped.model)
    ready = fused(original)
    if pixels:
        original, ready = (PixelInput(each, shipped.preprocessing).eval() for each in (original, ready))
    folder = Path(out) if out is not None else Path(f"{shipped.name.replace('/', '-')}-{format}")
    height, width = shipped.preprocessing.img_size
    manifest: dict[str, Any] = {
        "format": format,
        "file": kind.file,
        "model": shipped.name,
        "zoo_version": zoo.__version__,
        "weights_sha256": hash_of_weights(shipped.model),
        "random_weights": shipped.random,
        "input": {
            "name": "input",
            "shape": [
                "batch" if kind.free_batch else 1,
                shipped.in_chans,
                *(("height", "width") if free_size else (height, width)),
            ],
            "dtype": "float32",
            "values": "pixels, 0 to 255" if pixels else "normalised",
        },
        "output": {"name": "logits"},
        "preprocessing": {**shipped.preprocessing.to_dict(), "in_the_file": ["scale", "normalise"] if pixels else []},
        "labels": list(shipped.labels),
        "multi_label": shipped.multi_label,
    }
    with EXPORTED.written(folder) as new:
        file = new / kind.file
        example = _input(1, shipped.in_chans, height, width, pixels=pixels)
        kind.write(ready, example, file, free_size=free_size, notes=notes_of(manifest))
        checks = verify(kind, file, original, shipped.in_chans, (height, width), free_size=free_size, pixels=pixels)
        manifest |= {
            "checks": [{**vars(check), "input": list(check.input)} for check in checks],
            "tolerance": TOLERANCE,
            "versions": {"torch": torch.__version__, **kind.versions()},
            "sha256": {
                str(each.relative_to(new)): sha256_of(each) for each in sorted(new.rglob("*")) if each.is_file()
            },
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(manifest, indent=2)
        manifest = json.loads(text)  # as whoever reads the file gets it: lists for tuples
        with write_atomically(new / MANIFEST) as manifest_file:
            manifest_file.write(text.encode())
    shape = ["B" if kind.free_batch else 1, shipped.in_chans, *(("H", "W") if free_size else (height, width))]
    return Exported(folder / kind.file, manifest, kind.snippet(folder / kind.file, shape))


def verify(
    kind: Format,
    file: Path,
    original: nn.Module,
    channels: int,
    size: tuple[int, int],
    *,
    free_size: bool,
    pixels: bool = False,
) -> list[Check]:
    """Run the file in its own runtime on the inputs that the model is given; none where that runtime is not here.

    Raises:
        ExportError: If it cannot be loaded or run, or answers differently.
    """
    try:
        run = kind.load(file)
    except Exception as error:
        raise ExportError(
            f"The file for {kind.name} was written, and its runtime cannot load it: {reason(error)}."
        ) from error
    if run is None:
        return []
    height, width = size
    shapes = [(batch if kind.free_batch else 1, height, width) for batch in BATCHES]
    if free_size:
        shapes += [(1, height + 32, width + 32), (2, height + 64, width + 32), (1, max(64, height - 32), width + 96)]
    checks = []
    for seed, (batch, *hw) in enumerate(shapes):
        x = _input(batch, channels, *hw, pixels=pixels, seed=seed)
        with torch.no_grad():
            expected = original(x)
            try:
                answer = run(x)
            except Exception as error:
                raise ExportError(
                    f"The file for {kind.name} does not run on {list(x.shape)}: {reason(error)}."
                ) from error
        if answer.shape != expected.shape:
            raise ExportError(
                f"The file for {kind.name} answers {list(answer.shape)} to {list(x.shape)}; "
                f"expected {list(expected.shape)}."
            )
        check = Check(
            tuple(x.shape),
            max_abs=float((answer - expected).abs().max()),
            scale=max(1.0, float(expected.std())),
            top1_same=float((answer.argmax(1) == expected.argmax(1)).float().mean()),
        )
        if not check.passed:
            raise ExportError(
                f"The file for {kind.name} differs from the model by {check.max_abs:.1e} on {list(x.shape)}; expected "
                f"at most {TOLERANCE * check.scale:.1e}."
            )
        checks.append(check)
    return checks


def _input(batch: int, channels: int, height: int, width: int, *, pixels: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if pixels:
        return torch.randint(0, 256, (batch, channels, height, width), generator=generator).float()
    return torch.randn(batch, channels, height, width, generator=generator)


def _shipped(model: str | nn.Module, img_size: int | None, random_weights: bool) -> Shipped:
    if isinstance(model, str):
        return load_for_shipping(model, img_size=img_size, random_weights=random_weights)
    if img_size is not None or random_weights:
        raise ConfigError("img_size and random_weights are for a model's name; this is a module, and goes as it is.")
    found: Any = model
    config = getattr(found, "config", None)
    if not isinstance(config, ImageConfig):
        raise ConfigError(f"model is {type(model).__name__}; expected a name, or an image model of the zoo.")
    cfg = getattr(found, "pretrained_cfg", None) or {}
    given = {key: cfg[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std") if key in cfg}
    labels = cfg.get("label_names") or tuple(map(str, range(found.num_classes)))
    name = cfg.get("architecture") or type(model).__name__
    return Shipped(name, found, Preprocessing(img_size=config.input_hw, **given), tuple(labels), random=False)


def hash_of_weights(model: nn.Module) -> str:
    """The sha256 of all tensors of a model, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
