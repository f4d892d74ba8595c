"""zoo.export: every format, run again in its own runtime, for every family; what it refuses."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from variants import lightest_of_each_family

import zoo
from zoo.deploy import formats
from zoo.deploy.export import BATCHES, Exported
from zoo.deploy.folder import EXPORTED, OPTIMISED, Kind
from zoo.deploy.formats import Onnx, get_format, notes_of
from zoo.deploy.program import copy_for_inference
from zoo.errors import ConfigError, ExportError, WeightsError
from zoo.registry import index

LIGHTEST_FIRST = sorted(zoo.list_models(task="image-classification"), key=lambda name: (index()[name]["macs"], name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        if metafunc.config.getoption("--every-variant"):
            variants = LIGHTEST_FIRST
        elif "torchscript" in metafunc.function.__name__:
            variants = []  # tests/models/test_export.py scripts the lightest ones
        else:
            variants = lightest_of_each_family(LIGHTEST_FIRST)
        metafunc.parametrize("variant", variants)


@pytest.fixture(scope="module")
def small(randomise: Callable) -> nn.Module:
    sizes = {"depths": (1, 1, 1), "widths": (16, 24, 32), "num_heads": (2, 2, 2), "img_size": 64, "num_classes": 7}
    return randomise(zoo.create_model("efficientvit_m0", **sizes))


@pytest.mark.slow
def test_every_family(
    variant: str,
    randomise: Callable,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files are compared with the model inside, at three batch sizes.

    ``pytest tests/deploy/test_export_files.py -k every_family --every-variant`` takes all variants, each at its own
    size, instead of the lightest of each family at 64 pixels. The three formats start from the same program, so it is
    captured, and converted to ONNX, once.
    """
    size = {} if request.config.getoption("--every-variant") else {"img_size": 64}
    model = randomise(zoo.create_model(variant, **size))
    monkeypatch.setattr(formats, "capture", once(formats.capture))
    monkeypatch.setattr(torch.onnx, "export", once(torch.onnx.export))
    for format in ("torch-export", "onnx", "openvino"):
        check(zoo.export(model, format, tmp_path / format))


@pytest.mark.slow
def test_every_family_as_torchscript(variant: str, randomise: Callable, tmp_path: Path) -> None:
    """As :func:`test_every_family`, and only with ``--every-variant``."""
    model = randomise(zoo.create_model(variant))
    if index()[variant]["family"] == "efficientvmamba":
        with pytest.raises(ExportError, match="has an operator of zoo's that no other process knows"):
            zoo.export(model, "torchscript", tmp_path / "out")
        return
    check(zoo.export(model, "torchscript", tmp_path / "out"))


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called once, and gives what that gave ever after."""
    found: list[Any] = []

    def call(*args: Any, **options: Any) -> Any:
        if not found:
            found.append(function(*args, **options))
        return found[0]

    return call


def check(exported: Exported) -> None:
    assert [check["input"][0] for check in exported.manifest["checks"]] == list(BATCHES)
    assert all(check["max_abs"] <= 1e-4 * check["scale"] for check in exported.manifest["checks"])


@pytest.mark.slow
def test_torchscript_at_every_size(small: nn.Module, tmp_path: Path) -> None:
    exported = zoo.export(small, "torchscript", tmp_path / "out", free_size=True)
    sizes = {tuple(check["input"][2:]) for check in exported.manifest["checks"]}
    assert sizes == {(64, 64), (96, 96), (128, 96), (64, 160)}
    assert exported.manifest["input"]["shape"] == ["batch", 3, "height", "width"]


@pytest.mark.slow
def test_onnx_says_what_it_is(small: nn.Module, tmp_path: Path) -> None:
    import onnx

    exported = zoo.export(small, "onnx", tmp_path / "out", pixels=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == exported.manifest
    inside = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert inside == notes_of(manifest)
    assert json.loads(inside["labels"]) == [str(i) for i in range(7)]
    assert manifest["preprocessing"]["in_the_file"] == ["scale", "normalise"]
    # Pixels go in: the same answer as normalised pixels to the model.
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, std = (torch.tensor(manifest["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
    ours = Onnx().load(exported.path)(pixels)
    with torch.no_grad():
        assert torch.allclose(ours, small((pixels / 255 - mean) / std), atol=1e-4)
    assert 'session.run(None, {"input": x})' in exported.snippet


def test_a_file_that_answers_otherwise_is_not_kept(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = get_format("onnx")
    monkeypatch.setattr(kind, "write", lambda model, example, path, **_: path.write_bytes(b"onnx"))
    monkeypatch.setattr(kind, "load", lambda path: lambda x: small(x) + 1e-3)
    with pytest.raises(ExportError, match=r"differs from the model by 1\.0e-03 on \[1, 3, 64, 64\]"):
        zoo.export(small, "onnx", tmp_path / "out")
    monkeypatch.setattr(kind, "load", lambda path: lambda x: small(x)[:1])
    with pytest.raises(ExportError, match=r"answers \[1, 7\] to \[2, 3, 64, 64\]"):
        zoo.export(small, "onnx", tmp_path / "out")
    monkeypatch.setattr(kind, "load", lambda path: lambda x: small(x) * float("nan"))
    with pytest.raises(ExportError, match="differs from the model by nan"):
        zoo.export(small, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean: onnx"):
        zoo.export(small, "onx", tmp_path / "out")
    with pytest.raises(WeightsError, match="random ones is of no use; ask for them"):
        zoo.export("efficientnet_b7", "onnx", tmp_path / "out")
    for options in ({}, {"random_weights": True}):
        with pytest.raises(WeightsError, match=r"mor_2m_r3 reads text; expected an image model: zoo\.optimize"):
            zoo.export("mor_2m_r3", "onnx", tmp_path / "out", **options)
    with pytest.raises(WeightsError, match="mor_135m_r2_expert reads text"):  # has no weights either
        zoo.export("mor_135m_r2_expert", "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a name, or an image model of the zoo"):
        zoo.export(nn.Linear(2, 2), "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="expected no free size"):
        zoo.export(small, "coreml", tmp_path / "out", free_size=True)
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ExportError, match="is not an exported model"):
        zoo.export(small, "onnx", tmp_path)


# The beginnings of what a training run, an export and an optimised model write.
MANIFESTS: dict[str, dict[str, Any]] = {
    "a run": {"id": "1", "recipe": "", "data": "", "code": ""},
    "an exported model": {"format": "onnx", "file": "model.onnx", "checks": [], "exported_at": ""},
    "an optimised model": {"format": 1, "job": {}, "files": {}, "report": {}},
}


@pytest.mark.parametrize("kind", [EXPORTED, OPTIMISED], ids=lambda kind: kind.words)
@pytest.mark.parametrize("there", MANIFESTS)
def test_a_folder_takes_the_place_of_its_kind_alone(kind: Kind, there: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(MANIFESTS[there]))
    (tmp_path / "out" / "model.safetensors").write_text("precious")

    def write() -> None:
        with kind.written(tmp_path / "out") as folder:
            (folder / "new").touch()

    if there == kind.words:
        write()
    else:
        with pytest.raises(ExportError, match=f"exists and is not {kind.words}; expected a new folder"):
            write()
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == (["new"] if there == kind.words else ["manifest.json", "model.safetensors"])


def test_a_run_is_not_exported_over(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_format("onnx"), "write", lambda model, example, path, **_: path.write_bytes(b"onnx"))
    monkeypatch.setattr(get_format("onnx"), "load", lambda path: small)
    zoo.export(small, "onnx", tmp_path / "out")
    zoo.export(small, "onnx", tmp_path / "out")  # its own again
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(MANIFESTS["a run"]))
    with pytest.raises(ExportError, match="is not an exported model"):
        zoo.export(small, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"onnx"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "coreml"])
def test_formats_with_extras_of_their_own(format: str, small: nn.Module, randomise: Callable, tmp_path: Path) -> None:
    package = get_format(format).packages[0]
    if importlib.util.find_spec(package) is None:
        with pytest.raises(zoo.MissingExtraError, match=f'pip install "efficient-zoo\\[{format}\\]"'):
            zoo.export(small, format, tmp_path / "out")
        pytest.skip(f"needs {package}, an extra of its own")
    # ExecuTorch 1.5.1 stops at its own split of the few channels of `small`; it takes the real variants.
    model = small if format == "coreml" else randomise(zoo.create_model("tinynet_e"))
    exported = zoo.export(model, format, tmp_path / "out")
    assert exported.path.exists()
    assert exported.verified or format == "coreml"
    if format == "coreml":  # the other route to it, which users of older tools take
        import coremltools

        traced = torch.jit.trace(copy_for_inference(small), torch.zeros(1, 3, 64, 64))
        kind = coremltools.TensorType(name="input", shape=(1, 3, 64, 64))
        coremltools.convert(traced, inputs=[kind], convert_to="mlprogram", skip_model_load=True)
