"""zoo.optimize, what it says, what it saves, and what it survives."""

import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo.cli import main
from zoo.deploy import forms
from zoo.deploy import optimize as module
from zoo.deploy.engines import CALIBRATION, Job, get_engine, register_engine
from zoo.deploy.forms import Form, register_form
from zoo.deploy.optimize import Row, error_limit, in_full_fp32
from zoo.deploy.program import capture, copy_for_inference, fused, save_program
from zoo.errors import ConfigError, ExportError, ShapeError

SIZES = {"depths": (1, 1, 1), "widths": (16, 24, 32), "num_heads": (2, 2, 2), "img_size": 64, "num_classes": 7}
PATIENT = 900.0  # seconds: no test fails since the machine is busy


class Convs(nn.Module):
    """Quick to export and to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def model(randomise: Callable) -> nn.Module:
    return randomise(Convs()).train()


@pytest.fixture(scope="module")
def vit(randomise: Callable) -> nn.Module:
    return randomise(zoo.create_model("efficientvit_m0", **SIZES))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def search(model: nn.Module, *args: Any, **options: Any) -> Any:
    """In fp32 unless a test asks for more: whether "auto" means bf16 too depends on the CPU."""
    defaults = {"precision": "fp32", "time_limit": PATIENT, "rounds": 3, "threads": 1}
    return zoo.optimize(model, *args, **{**defaults, **options})


@pytest.fixture(scope="module")
def fast(model: nn.Module, pictures: Tensor) -> Any:
    engines = ["eager", "channels-last", "onnxruntime", "openvino"]
    return search(model, pictures[:1], precision="int8", tolerance=0.5, pictures=pictures, engines=engines)


def eval_of(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    with torch.inference_mode():
        y = model.eval()(x)
    model.train(training)
    return y


def test_every_engine_and_precision_answers_the_same(fast: Any, model: nn.Module, pictures: Tensor) -> None:
    rows = {(row.engine, row.precision): row for row in fast.report.rows}
    measured = {key for key, row in rows.items() if row.latency_ms is not None}
    fp32 = {(name, "fp32") for name in ("eager", "channels-last", "onnxruntime", "openvino")}
    assert measured == fp32 | {("onnxruntime", "int8"), ("openvino", "int8")}, str(fast.report)
    assert all(rows[key].error < 1e-5 for key in fp32)
    assert all(1e-4 < rows[key].error < 0.5 for key in measured - fp32)
    assert all(rows[key].agreement == 1.0 for key in fp32)
    assert rows["eager", "int8"].status == "skipped"
    x = pictures[3:4]
    tolerance = {"fp32": 1e-4, "int8": 0.5}[fast.report.chosen.precision]
    assert (fast(x) - eval_of(model, x)).norm() <= tolerance * eval_of(model, x).norm()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_pictures_may_be_in_channels_last(
    engine: str, model: nn.Module, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = search(model, pictures[:2], engines=[engine])
    x = pictures[2:4].contiguous(memory_format=torch.channels_last)
    expected = fast(pictures[2:4])
    monkeypatch.setattr(Tensor, "contiguous", mock.Mock(side_effect=AssertionError("its threads would be in the way")))
    assert torch.equal(fast(x), expected)


def test_the_report_explains_the_choice(fast: Any) -> None:
    chosen = fast.report.chosen
    text = str(fast.report)
    assert "times as fast as the model as it was given" in text or chosen.engine == "eager"
    assert "Checked on 16 pictures." in text
    assert min(row.latency_ms for row in fast.report.rows if row.latency_ms is not None) == chosen.latency_ms
    json.dumps(fast.report.to_dict())


def test_the_model_stays_as_it_is(fast: Any, model: nn.Module) -> None:
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_inductor_is_left_out_of_a_short_search(model: nn.Module, pictures: Tensor, monkeypatch: Any) -> None:
    monkeypatch.setattr("zoo.deploy.engines._ENGINES", {"inductor": "zoo.deploy.engines:Inductor"})
    rows = search(model, pictures[:1], time_limit=60.0).report.rows
    (row,) = [row for row in rows if row.engine == "inductor" and row.precision == "fp32"]
    assert (row.status, row.note[:21]) == ("skipped", "compiles for minutes:")


def test_other_inputs_are_refused(fast: Any, pictures: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3, 64, 64\] float32; this was optimised for \[1, 3, 64, 64\] float32"):
        fast(pictures[:2])
    with pytest.raises(ShapeError, match="float64"):
        fast(pictures[:1].double())
    with pytest.raises(ShapeError, match="optimised for"):
        fast(pictures[:1], pictures[:1])


def check_saved_and_loaded(saved: Any, model: nn.Module, pictures: Tensor, tmp_path: Path, atol: float = 1e-4) -> None:
    saved.save(tmp_path / "fast")
    saved.save(tmp_path / "fast")  # over itself
    loaded = zoo.load_optimized(tmp_path / "fast")
    assert torch.equal(loaded(pictures[:2]), saved(pictures[:2]))
    assert (loaded(pictures[2:4]) - eval_of(model, pictures[2:4])).abs().max() < atol
    assert str(loaded.report) == str(saved.report)
    loaded.save(tmp_path / "again")
    assert torch.equal(zoo.load_optimized(tmp_path / "again")(pictures[:2]), saved(pictures[:2]))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or not file.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04")), "a pickle"
    assert not list(tmp_path.glob(".*")), "something was left behind"
    for file in (tmp_path / "fast").iterdir():  # by somebody else, while it is in use
        os.truncate(file, 0)
    assert torch.equal(loaded(pictures[:2]), saved(pictures[:2]))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_are_saved_and_loaded(engine: str, model: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    saved = search(model, pictures[:2], engines=[engine])
    assert saved.report.chosen.engine == engine
    check_saved_and_loaded(saved, model, pictures, tmp_path)


def test_bf16_is_saved_and_loaded(
    model: nn.Module, pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.deploy.optimize.FP32_TOLERANCE", 0.0)  # OpenVINO's fp32 is wrong then, however fast it is
    saved = search(model, pictures[:2], engines=["openvino"], precision=["fp32", "bf16"])
    rows = {(row.engine, row.precision): row for row in saved.report.rows}
    assert rows["openvino", "fp32"].status == "wrong"
    if rows["openvino", "bf16"].status == "skipped":
        assert rows["openvino", "bf16"].note == "this CPU does not compute in bf16"
        pytest.skip("this CPU does not compute in bf16")
    assert 1e-4 < rows["openvino", "bf16"].error < 1e-2
    assert saved.report.chosen is rows["openvino", "bf16"]
    check_saved_and_loaded(saved, model, pictures, tmp_path, atol=1e-2)


@pytest.mark.parametrize("form", ["eager", "fused", "channels-last"])
def test_forms_are_saved_and_loaded(form: str, vit: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    saved = search(vit, pictures[:2], engines=[form])
    assert saved.report.chosen.engine == form
    check_saved_and_loaded(saved, vit, pictures, tmp_path)


class Two(nn.Module):
    """Two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x.relu()), x.mean(1)


@pytest.mark.slow
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(2, 8)
    compiled = search(model, x, engines=["inductor"])
    assert compiled.report.chosen.engine == "inductor", str(compiled.report)
    expected = model(x)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(compiled(x), expected, strict=True))
    path = compiled.save(tmp_path / "compiled")
    loaded = zoo.load_optimized(path)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded(x), compiled(x), strict=True))
    # Machine code from elsewhere does not run, even if its manifest says that it is from here.
    monkeypatch.setattr("zoo.deploy.artefact._trusted", lambda files: False)
    with pytest.raises(ExportError, match="machine code that was not built here"):
        zoo.load_optimized(path)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def test_control_flow_that_depends_on_values() -> None:
    fast = search(Branches(), torch.ones(1, 4))
    assert fast.report.chosen.engine == "eager"
    assert torch.equal(fast(-torch.ones(1, 4)), -2 * torch.ones(1, 4))
    notes = {row.engine: row.note for row in fast.report.rows}
    assert "its control flow depends on the values" in notes["onnxruntime"], notes
    assert "its control flow depends on the values" in notes["inductor"], notes
    with pytest.raises(ExportError, match="is saved as tensors for a model of the zoo"):
        fast.save("nowhere")


@pytest.mark.parametrize(
    "example, options, error, message",
    [
        (torch.zeros(3, 64, 64), {}, ShapeError, r"expected \[batch, 3, 64, 64\] float32"),
        (torch.zeros(1, 4, 64, 64), {}, ShapeError, r"example is \[1, 4, 64, 64\] float32"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), {}, ShapeError, "uint8"),
        (torch.zeros(1, 3, 64, 64).double(), {}, ShapeError, "expected torch.float32"),
        ([1.0], {}, ShapeError, "has a float"),
        (None, {"target": "npu"}, ConfigError, "Device 'npu' cannot be used here"),
        (None, {"precision": "fp23"}, ConfigError, "Did you mean: fp32"),
        (None, {"engines": ["onnxruntim"]}, ConfigError, "Did you mean: onnxruntime"),
        (None, {"pictures": torch.zeros(4, 3, 32, 32)}, ShapeError, r"pictures are \[N, 3, 32, 32\]"),
    ],
)
def test_bad_input(vit: nn.Module, example: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        search(vit, example, **options)
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_language_models_are_packed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = zoo.create_model("matmulfree_2m", hidden_size=64, num_hidden_layers=2).eval()
    tokens = torch.tensor([[5, 6, 7]])
    packed = search(model, engines=["packed"], precision="fp32")
    assert packed.report.chosen.engine == "packed"
    assert not any(isinstance(layer, nn.Linear) for layer in packed.model.modules())
    assert torch.equal(packed(tokens), model(tokens).logits), "any number of tokens, exactly the same"
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(tokens, **options), model.generate(tokens, **options))
    packed.save(tmp_path / "lm")
    assert torch.equal(zoo.load_optimized(tmp_path / "lm")(tokens), packed(tokens))

    tried = {row.engine for row in search(model, time_limit=20.0).report.rows if row.status != "skipped"}
    assert tried == {"eager", "packed"}, "forms, which can generate, and only those that fit"
    with pytest.raises(ConfigError, match="Linear writes no text"):
        search(nn.Linear(4, 2), torch.ones(1, 4), engines=["eager"]).generate(tokens)


@torch.no_grad()
def test_replayed_steps_change_nothing_elsewhere() -> None:
    pytest.importorskip("transformers")
    from zoo.deploy.steps import ReplayedSteps, replay_steps

    model: Any = zoo.create_model("matmulfree_2m", hidden_size=64, num_hidden_layers=2).eval()
    tokens = torch.tensor([[5, 6, 7], [1, 2, 3]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected, names = model.generate(tokens, **options), list(model.state_dict())
    copied = copy.deepcopy(replay_steps(model))
    assert isinstance(copied.model.forward, ReplayedSteps)
    assert copied.model.forward.trunk is copied.model
    assert list(copied.state_dict()) == names
    for each in (model, copied):
        assert torch.equal(each.generate(tokens, **options), expected)
        assert not each.model.forward.steps, "nothing is recorded on a CPU"


@pytest.mark.gpu
@torch.no_grad()
def test_steps_are_replayed_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = zoo.create_model("matmulfree_2m", hidden_size=64, num_hidden_layers=2).eval()
    fast = search(model, target="cuda", precision="fp32", engines=["packed-cuda-graph"])
    assert fast.report.chosen.engine == "packed-cuda-graph", str(fast.report)
    packed = search(model, target="cuda", precision="fp32", engines=["packed"])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for rows in (1, 3, 1):  # two recordings, the first used twice
        tokens = torch.randint(256, (rows, 7), device="cuda")
        mask = torch.ones_like(tokens)
        mask[-1, :2] = 0  # padding on the left
        found = fast.generate(tokens, attention_mask=mask, **options)
        assert torch.equal(found, packed.generate(tokens, attention_mask=mask, **options))
    assert len(fast.model.model.forward.steps) == 2


def test_models_that_cannot_be_optimised() -> None:
    x = torch.ones(1, 4)
    with pytest.raises(ConfigError, match="example is None"):
        search(nn.Linear(4, 2))
    with pytest.raises(ShapeError, match="does not take the example"):
        search(nn.Linear(3, 2), x)
    with pytest.raises(ExportError, match="answers differently each time"):
        search(type("Noise", (nn.Module,), {"forward": lambda self, x: x + torch.rand_like(x)})(), x)
    with pytest.raises(ExportError, match="returns dict"):
        search(type("Dict", (nn.Module,), {"forward": lambda self, x: {"x": x}})(), x)
    with pytest.raises(ExportError, match="not finite"):
        search(type("Nan", (nn.Module,), {"forward": lambda self, x: x / 0})(), x)


HOSTILE = """
import os, time, torch
from zoo.deploy.engines import Engine

class Hostile(Engine):
    package = "torch"
    def load(self, folder, job):
        return lambda x: [x * 0]

class Aborts(Hostile):
    def build(self, source, folder, job): os.abort()

class Hangs(Hostile):
    def build(self, source, folder, job): time.sleep(3600)

class Raises(Hostile):
    def build(self, source, folder, job): raise RuntimeError("no kernel\\nfor this")

class Lies(Hostile):
    def build(self, source, folder, job): pass

class Absent(Hostile):
    package = "no_such_package"

class Honest(Hostile):
    def build(self, source, folder, job): pass
    def load(self, folder, job):
        return lambda x: [x + x]
"""


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def test_a_default_search_reports_all_that_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_engines.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("zoo.deploy.engines._ENGINES", {})
    register_engine("Honest", "hostile_engines:Honest")
    report = search(Doubles(), torch.ones(1, 4), precision="auto").report
    measured = {(row.engine, row.precision) for row in report.rows if row.latency_ms is not None}
    assert measured >= {("eager", "fp32"), ("Honest", "fp32")}, str(report)
    assert report.chosen.latency_ms == min(row.latency_ms for row in report.rows if row.latency_ms is not None)


def test_engines_that_fail_never_fail_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_engines.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("zoo.deploy.engines._ENGINES", {})
    for name in ("Aborts", "Raises", "Lies", "Absent"):
        register_engine(name, f"hostile_engines:{name}")
    linear = nn.Linear(4, 4)
    fast = search(linear, torch.ones(1, 4))
    rows = {row.engine: row for row in fast.report.rows}
    assert fast.report.chosen.engine == "eager"
    assert (rows["Aborts"].status, rows["Aborts"].note) == ("failed", "its process crashed (SIGABRT)")
    assert (rows["Raises"].status, rows["Raises"].note) == ("failed", "RuntimeError: no kernel")
    assert (rows["Lies"].status, rows["Lies"].note) == ("wrong", "differs by more than 0.0001")
    assert (rows["Absent"].status, rows["Absent"].note) == ("skipped", "no_such_package is not installed")
    monkeypatch.setattr("zoo.deploy.engines._ENGINES", {})
    register_engine("Hangs", "hostile_engines:Hangs")
    fast = search(linear, torch.ones(1, 4), time_limit=3.0)
    assert fast.report.chosen.engine == "eager"
    assert "Hangs" in str(fast.report)
    assert fast.report.facts["search_s"] < 120


def test_an_interrupt_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_engines.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("zoo.deploy.engines._ENGINES", {})
    register_engine("Hangs", "hostile_engines:Hangs")
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )
    monkeypatch.setattr("zoo.deploy.forms.make", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(nn.Linear(4, 4), torch.ones(1, 4))
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_a_form_of_ones_own(vit: nn.Module, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.deploy.forms._FORMS", dict(forms._FORMS))
    register_form(Form("mine", copy_for_inference))
    fast = search(vit, pictures[:1], engines=["mine"])
    assert fast.report.chosen.engine == "mine"


@pytest.fixture(scope="module")
def artefact(model: nn.Module, pictures: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return search(model, pictures[:1], engines=["onnxruntime"]).save(tmp_path_factory.mktemp("artefact") / "onnx")


def edited(artefact: Path, tmp_path: Path, **changes: Any) -> Path:
    import shutil

    path = tmp_path / "edited"
    shutil.copytree(artefact, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_an_artefact_of_another_version_or_machine(
    artefact: Path, tmp_path: Path, pictures: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    versions = {**manifest["versions"], "onnxruntime": "0.9"}
    path = edited(artefact, tmp_path, versions=versions, machine={"id": "other", "cpu": "6502"})
    loaded = zoo.load_optimized(path)
    assert "onnxruntime 0.9 (here 1." in caplog.text
    assert "the machine 6502" in caplog.text
    assert torch.equal(loaded(pictures[:1]), zoo.load_optimized(artefact)(pictures[:1]))


def test_an_artefact_that_answers_otherwise_is_refused(artefact: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from zoo.pretrained.files import sha256_of

    path = edited(artefact, tmp_path)
    check = load_file(path / "check.safetensors")
    save_file({**check, "output.0": check["output.0"] + 1}, path / "check.safetensors")
    with pytest.raises(ExportError, match="is not what was saved: its hash differs"):
        zoo.load_optimized(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["check.safetensors"] = sha256_of(path / "check.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="no longer answers as when it was saved"):
        zoo.load_optimized(path)


def test_what_is_no_artefact(artefact: Path, tmp_path: Path, model: nn.Module, pictures: Tensor, fast: Any) -> None:
    with pytest.raises(ExportError, match="has format 99, of another version of zoo"):
        zoo.load_optimized(edited(artefact, tmp_path, format=99))
    for number, damage in enumerate([{"job": {"motor": 1}}, {"job": None}, {"report": {}}, {"report": []}]):
        with pytest.raises(ExportError, match=r"manifest\.json is damaged: .*\. Optimise the model again"):
            zoo.load_optimized(edited(artefact, tmp_path / str(number), **damage))
    job = json.loads((artefact / "manifest.json").read_text())["job"]
    elsewhere = edited(artefact, tmp_path / "elsewhere", job={**job, "target": "cuda:99"})
    with pytest.raises(ExportError, match=r"was optimised for cuda:99\. .*\. Optimise the model here"):
        zoo.load_optimized(elsewhere)
    (tmp_path / "edited" / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="is damaged"):
        zoo.load_optimized(tmp_path / "edited")
    with pytest.raises(ExportError, match=r"has no manifest\.json"):
        zoo.load_optimized(tmp_path)
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ExportError, match="exists and is not an optimised model"):
        fast.save(tmp_path)
    with pytest.raises(ExportError, match="exists and is not an optimised model"):
        fast.save(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"
    path = edited(artefact, tmp_path / "whole")
    (path / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"model\.onnx is missing"):
        zoo.load_optimized(path)


def test_built_again_elsewhere(vit: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    saved = search(vit, pictures[:1], engines=["fused"])
    path = edited(saved.save(tmp_path / "here"), tmp_path, machine={"id": "other", "cpu": "6502"})
    again = zoo.load_optimized(path, rebuild=True)
    assert again.report.chosen.engine == "fused"
    assert (again(pictures[:1]) - saved(pictures[:1])).abs().max() < 1e-5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Tensor) -> None:
    from zoo.cli import app

    arguments = ["optimize", "efficientvit_m0.zoo_cifar10", "--engines", "eager,onnxruntime", "--time-limit", "900"]
    app([*arguments, "--precision", "fp32", "--out", str(tmp_path / "m0"), "--threads", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "onnxruntime" in shown
    assert "zoo.load_optimized(" in shown
    loaded = zoo.load_optimized(tmp_path / "m0")
    model = zoo.create_model("efficientvit_m0.zoo_cifar10", pretrained=True).eval()
    with torch.inference_mode():
        assert (loaded(pictures[:1]) - model(pictures[:1])).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target", "tpu"), "Device 'tpu' cannot be used here"),
        (("--precision", "fp32,int4"), "precision is 'int4'; expected 'auto' or fp32, bf16, fp16, int8."),
        (("--engines", "onnxrunntime"), "There is no engine 'onnxrunntime'"),
    ],
)
def test_the_command_refuses_before_it_fetches(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["optimize", "efficientvit_m0.r224_in1k", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_openvino_quantises_all_weights_but_the_last_layers(model: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    import numpy as np
    import openvino

    source = save_program(capture(fused(model), (pictures[:1],)), tmp_path / "model.onnx", onnx=True)
    np.save(tmp_path / CALIBRATION, pictures.numpy())
    (tmp_path / "built").mkdir()
    get_engine("openvino").build(source, tmp_path / "built", Job(engine="openvino", precision="int8"))
    operators = openvino.Core().read_model(tmp_path / "built" / "model.xml").get_ops()
    found = [
        (op.get_type_name(), op.input_value(0).get_node().get_type_name() == "FakeQuantize")
        for op in operators
        if op.get_type_name() in ("Convolution", "MatMul")
    ]
    assert sorted(found) == [("Convolution", True), ("Convolution", True), ("MatMul", False)]


class Gated(nn.Module):
    """What onnxruntime would quantise by default, and should not: gates and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU())
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_onnxruntime_quantises_products_and_no_gates(pictures: Tensor, tmp_path: Path, randomise: Callable) -> None:
    import numpy as np
    import onnx

    gated = randomise(Gated())
    source = save_program(capture(gated, (pictures[:1],)), tmp_path / "model.onnx", onnx=True)
    np.save(tmp_path / CALIBRATION, pictures.numpy())
    (tmp_path / "built").mkdir()
    job = Job(engine="onnxruntime", precision="int8")
    get_engine("onnxruntime").build(source, tmp_path / "built", job)
    nodes = onnx.load(tmp_path / "built" / "model.onnx").graph.node
    before = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    after = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    kinds = {node.op_type for node in nodes if node.input[0] in before and node.output[0] in after}
    assert {"Conv", "Gemm"} <= kinds
    assert not kinds & {"Mul", "Sigmoid", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
    (found,) = get_engine("onnxruntime").load(tmp_path / "built", job)(pictures[:1])
    expected = eval_of(gated, pictures[:1])
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_onnxruntime_is_told_which_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[Any] = []
    session = mock.Mock(get_inputs=list)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, providers: asked.append(providers) or session)
    for target in ("cpu", "cuda", "cuda:1"):
        get_engine("onnxruntime").load(tmp_path, Job(engine="onnxruntime", target=target))
    gpus = [[("CUDAExecutionProvider", {"device_id": i})] for i in (0, 1)]
    assert asked == [["CPUExecutionProvider"], *gpus]


def test_what_cannot_win_is_timed_once_when_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN", 0.001)
    took = {"eager fp32": 0.1, "fused fp32": 0.02, "inductor fp32": 0.02, "openvino fp32": 0.08}
    called = dict.fromkeys(took, 0)

    def call(key: str) -> None:
        called[key] += 1
        time.sleep(took[key])

    def timed(allowed: list[str], seconds: float) -> dict[str, Row]:
        rows = {key: Row(engine=key, precision="fp32", status="passed") for key in took}
        called.update(dict.fromkeys(took, 0))
        calls = {key: partial(call, key) for key in took}
        until = time.monotonic() + seconds
        timings = module._measure(calls, rows, allowed, target="cpu", threads=1, rounds=3, until=until)
        assert {key for key, row in rows.items() if not row.note} == set(timings)
        assert all(row.status == "slower" and row.latency_ms and row.speedup for row in rows.values())
        return rows

    rows = timed(list(took), 0.0)
    assert {key for key, row in rows.items() if row.note} == {"openvino fp32"}, "nor the model itself, to compare with"
    assert called["openvino fp32"] < called["fused fp32"]
    assert rows["openvino fp32"].rounds == 1 < rows["fused fp32"].rounds
    assert rows["openvino fp32"].speedup < rows["fused fp32"].speedup
    assert not any(row.note for row in timed(["openvino fp32"], 0.0).values()), "it is all that may win"
    assert not any(row.note for row in timed(list(took), 60.0).values())


@pytest.mark.gpu
def test_answers_of_a_gpu_are_compared_with_full_fp32(vit: nn.Module) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    rows = search(vit, torch.randn(2, 3, 64, 64), target="cuda", engines=["eager", "fused"]).report.rows
    by_tf32 = 1e-5 < rows[0].error < 5e-2
    assert by_tf32 == (torch.backends.cudnn.conv.fp32_precision == "tf32"), rows


def test_what_is_built_is_loaded_before_the_rest_is() -> None:
    built, building = mock.Mock(alive=False), mock.Mock(alive=True)
    asked = mock.Mock(_building=[built, building], deadline=float("inf"))
    module._Search._finish(asked, wait=False)
    built.finish.assert_called_once_with(asked)
    building.finish.assert_not_called()
    assert asked._building == [building]
    asked.deadline = 0.0
    module._Search._finish(asked, wait=True)
    building.finish.assert_called_once_with(asked)
    assert not asked._building


def test_a_model_that_is_not_finite_on_a_picture_is_refused(model: nn.Module, pictures: Tensor) -> None:
    spoiled = pictures.clone()
    spoiled[3, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match="answer to check 4 is not finite"):
        search(model, pictures[:1], pictures=spoiled, engines=["eager"])


def test_tf32_is_off_for_a_while() -> None:
    switches = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [each.fp32_precision for each in switches]
    with in_full_fp32():
        assert [each.fp32_precision for each in switches] == ["ieee"] * 3
    assert [each.fp32_precision for each in switches] == before


@pytest.mark.parametrize(
    ("precision", "target", "own", "tolerance", "limit"),
    [
        ("fp32", "cpu", 0.0, 1e-2, 1e-4),
        ("fp32", "cpu", 0.0, 1e-5, 1e-5),
        ("int8", "cpu", 0.0, 1e-2, 1e-2),
        ("fp32", "cuda:1", 5e-4, 1e-2, 2e-3),
        ("fp32", "cuda:1", 4e-4, 1e-3, 1e-3),
        ("fp32", "cuda:1", 2e-2, 1e-2, 4e-2),  # no form can be asked to be nearer than the model is
        ("fp16", "cuda:1", 2e-2, 1e-2, 4e-2),
        ("fp32", "cuda:1", 0.7, 1e-2, 0.1),  # an answer of zeros is off by 1
        ("fp16", "cuda:1", 2e-2, 0.5, 0.5),
    ],
)
def test_what_a_candidate_may_be_off_by(
    precision: str, target: str, own: float, tolerance: float, limit: float
) -> None:
    assert error_limit(precision, target, tolerance, own) == limit


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["channels-last", "cuda-graph", "channels-last-cuda-graph", "inductor"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu(engine: str, precision: str, vit: nn.Module, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 3, 64, 64, generator=generator)
    tolerance = {"fp32": 3e-2, "fp16": 5e-2, "bf16": 0.3}[precision]  # these weights make much of rounding
    fast = search(vit, example, target="cuda", precision=precision, engines=[engine], tolerance=tolerance)
    rows = {(row.engine, row.precision): row for row in fast.report.rows}
    assert rows[engine, precision].latency_ms is not None, str(fast.report)
    loaded = zoo.load_optimized(fast.save(tmp_path / "artefact"))
    assert loaded.job == fast.job
    inputs = torch.randn(2, 2, 3, 64, 64, generator=generator) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    answers = [eval_of(vit, x) for x in inputs]
    assert (answers[0] - answers[1]).norm() > 2 * tolerance * answers[0].norm(), "an old answer would pass"
    for x, expected in zip(inputs, answers, strict=True):
        for each in (fast, loaded):
            assert (each(x.cuda()).cpu() - expected).norm() <= tolerance * expected.norm()
