"""The selective scan: every implementation against the reference, the operator, what it refuses, and its export."""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
import torch
from threads import torch_threads
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.errors import ConfigError, ShapeError
from zoo.ops import _extension, selective_scan
from zoo.ops.selective_scan import (
    choose,
    cpu,
    mamba,
    onnx_decompositions,
    selective_scan_reference,
)
from zoo.ops.selective_scan._op import NAMES

CPU = torch.device("cpu")


def make_inputs(
    length: int = 19,
    *,
    batch: int = 2,
    channels: int = 6,
    states: int = 4,
    groups: int = 2,
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Inputs by name, in the order of the signature; None for those in ``without``."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {
        "u": randn(batch, channels, length),
        "delta": randn(batch, channels, length),
        "A": -randn(channels, states).exp(),
        "B": randn(batch, groups, states, length),
        "C": randn(batch, groups, states, length),
        "D": randn(channels),
        "z": randn(batch, channels, length),
        "delta_bias": randn(channels) - 1,
    }
    return {name: None if name in without else x.to(dtype) for name, x in inputs.items()}


def with_gradients(
    scan: Callable[..., Any], inputs: dict[str, Tensor | None], *, softplus: bool = True
) -> dict[str, Tensor]:
    """Both outputs and the gradients of a weighted sum of both, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    y, last_state = scan(**{**inputs, **leaves}, delta_softplus=softplus)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, last_state)]
    loss = (y * weights[0].to(y)).sum() + (last_state * weights[1].to(last_state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "last_state": last_state, **dict(zip(leaves, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Outputs to 1e-5 and gradients to 1e-4, of the largest number in each where that is above 1."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        tolerance = (1e-5 if name in ("y", "last_state") else 1e-4) * max(1.0, x.abs().max().item())
        assert_close(actual[name].to(x), x, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def scan_with_state(**inputs: Any) -> Any:
    return selective_scan(**inputs, return_last_state=True)


@pytest.fixture(params=["cpu", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the implementations for CPUs, forced."""
    monkeypatch.setenv(choose.variable, request.param)
    if request.param == "cpu" and cpu.EXTENSION.unavailable() is not None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must build the C++ kernel: {cpu.EXTENSION.unavailable()}")
        pytest.skip(str(cpu.EXTENSION.unavailable()))
    assert choose(CPU).name == request.param
    return request.param


SIZES: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 63},
    {"length": 100, "channels": 40, "states": 16, "groups": 1},
    {"length": 32, "channels": 34, "states": 1},
    {"length": 65, "batch": 1, "channels": 3, "states": 5, "groups": 3},
    {"length": 300, "batch": 1, "channels": 4, "states": 2},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("without", [(), ("z",), ("D", "z", "delta_bias")], ids=str)
def test_equals_the_reference(size: dict[str, Any], without: tuple[str, ...], implementation: str) -> None:
    inputs = make_inputs(**size, without=without)
    expected = with_gradients(selective_scan_reference, inputs)
    assert_same(with_gradients(scan_with_state, inputs), expected)


def test_without_softplus(implementation: str) -> None:
    inputs = make_inputs()
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta_bias"] = inputs["delta_bias"].abs()
    expected = with_gradients(selective_scan_reference, inputs, softplus=False)
    assert_same(with_gradients(scan_with_state, inputs, softplus=False), expected)


@pytest.mark.parametrize("name", ["cpu", "torch", "ref"])
def test_golden(name: str, golden: ModuleType, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the authors' own reference."""
    monkeypatch.setenv(choose.variable, name)
    case = golden.load_case(shared / "golden" / "selective_scan_ops.json")
    stored = golden.load_outputs(shared / "golden" / "selective_scan_ops.json")
    inputs = {key: stored[key].requires_grad_() for key in case["input"]["names"]}
    y, last_state = scan_with_state(**inputs, delta_softplus=case["config"]["delta_softplus"])
    y.backward(stored["dout"])
    actual = {"y": y, "last_state": last_state, **{key: x.grad for key, x in inputs.items()}}
    expected = {"y": stored["out"], "last_state": stored["last_state"]}
    assert_same(actual, {**expected, **{key: stored[f"grad_{key}"] for key in inputs}})


@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=str)
def test_gradcheck(without: tuple[str, ...], implementation: str) -> None:
    inputs = make_inputs(35, batch=1, channels=2, states=2, groups=1, without=without, dtype=torch.float64)
    leaves = [None if x is None else x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, True, True), leaves)


def test_extreme_numbers(implementation: str) -> None:
    """States that die at once, states that never do, and step sizes in both tails of softplus."""
    inputs = make_inputs(100, states=3, without=("z",))
    inputs["A"] = torch.tensor([-1e-8, -1.0, -1e6]).expand(6, 3)
    inputs["delta"] = torch.linspace(-100, 100, 100).expand(2, 6, 100)
    inputs["delta_bias"] = torch.zeros(6)
    expected = with_gradients(selective_scan_reference, {k: v.double() for k, v in inputs.items() if v is not None})
    actual = with_gradients(scan_with_state, inputs)
    assert_close(actual["y"].double(), expected["y"], rtol=1e-5, atol=1e-4)
    for name in ("u", "delta", "B", "C"):
        scale = expected[name].abs().max()
        assert_close(actual[name].double() / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_nothing_is_left_unwritten(implementation: str) -> None:
    inputs = make_inputs(37, channels=18)
    expected = with_gradients(selective_scan_reference, inputs)
    torch.use_deterministic_algorithms(True)  # empty tensors are then filled with NaN
    try:
        assert_same(with_gradients(scan_with_state, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads: int, implementation: str) -> None:
    inputs = make_inputs(70, batch=1, channels=66, groups=1)
    expected = with_gradients(selective_scan_reference, inputs)
    with torch_threads(threads):
        assert_same(with_gradients(scan_with_state, inputs), expected)


# What a caller may get wrong, or may not expect to work.


def test_three_dimensional_maps_are_one_group(implementation: str) -> None:
    inputs = make_inputs(groups=1)
    expected = selective_scan(**inputs, delta_softplus=True)
    maps = {"B": inputs["B"].squeeze(1), "C": inputs["C"].squeeze(1)}
    y = selective_scan(**{**inputs, **maps}, delta_softplus=True)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C": torch.zeros(2, 3, 4, 19)}, "B has 2 groups and C has 3"),
        (
            {"B": torch.zeros(2, 4, 4, 19), "C": torch.zeros(2, 4, 4, 19)},
            "4 groups, which do not divide the 6 channels",
        ),
        ({"B": torch.zeros(2, 0, 4, 19), "C": torch.zeros(2, 0, 4, 19)}, "0 groups"),
        ({"B": torch.zeros(2, 2, 5, 19)}, r"B has shape \[2, 2, 5, 19\]; expected .* N = 4"),
        ({"C": torch.zeros(6, 4)}, r"C has shape \[6, 4\]"),
        ({"u": torch.zeros(6, 19)}, r"u has shape \[6, 19\]; expected \[B, D, L\]"),
        ({"delta": torch.zeros(2, 6, 18)}, r"delta has shape \[2, 6, 18\]; expected \[2, 6, 19\]"),
        ({"z": torch.zeros(2, 6, 1)}, "z has shape"),
        ({"D": torch.zeros(6, 1)}, "D has shape"),
        ({"delta_bias": torch.zeros(5)}, "delta_bias has shape"),
        ({"A": torch.zeros(5, 4)}, r"A has shape \[5, 4\]; expected \[D, N\] with D = 6"),
        ({"A": torch.zeros(6, 0)}, "at least one state"),
        ({"A": torch.zeros(6, 4, dtype=torch.complex64)}, "A is complex"),
        ({"u": torch.zeros(2, 6, 19, dtype=torch.int64)}, "u is torch.int64"),
        ({"A": torch.zeros(6, 4, device="meta")}, "A is on meta and u on cpu"),
    ],
)
@pytest.mark.parametrize("name", ["", "ref"])
def test_refused(changes: dict[str, Tensor], message: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, name)
    with pytest.raises(ShapeError, match=message):
        selective_scan(**{**make_inputs(), **changes})


@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}], ids=str)
def test_empty(size: dict[str, int], implementation: str) -> None:
    inputs = make_inputs(**size)
    outputs = with_gradients(scan_with_state, inputs)
    assert outputs["y"].shape == inputs["u"].shape
    assert outputs["last_state"].shape == (len(inputs["u"]), 6, 4)
    assert not outputs["last_state"].any()
    assert not outputs["A"].any()


def test_nan_stays_in_its_channel_and_its_future(implementation: str) -> None:
    inputs = make_inputs(70)
    inputs["delta"][1, 2, 40] = float("nan")
    y, last_state = scan_with_state(**inputs, delta_softplus=True)
    expected, expected_state = selective_scan_reference(**inputs, delta_softplus=True)
    assert expected[1, 2, 40:].isnan().all()
    assert expected.isnan().sum() == 30
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(last_state.isnan(), expected_state.isnan())
    assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    gradients = with_gradients(scan_with_state, inputs)
    for name, gradient in with_gradients(selective_scan_reference, inputs).items():
        assert torch.equal(gradients[name].isnan(), gradient.isnan()), name
        finite = gradient.nan_to_num()
        assert_close(gradients[name].nan_to_num(), finite, rtol=0.0, atol=1e-4 * max(1.0, finite.abs().max().item()))


def test_infinite_input(implementation: str) -> None:
    inputs = make_inputs(70, without=("z", "D"))
    inputs["u"][0, 0, 10] = float("inf")
    expected, _ = selective_scan_reference(**inputs, delta_softplus=True)
    y = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(y[0, 0, :10].isfinite(), expected[0, 0, :10].isfinite())
    assert not y[0, 0, 10:12].isfinite().any()
    assert torch.equal(y[1:].isfinite(), expected[1:].isfinite())


def test_strides(implementation: str) -> None:
    """Not contiguous: transposed, sliced, expanded, channels last."""
    inputs = make_inputs(36)
    expected = with_gradients(selective_scan_reference, inputs)
    strided = {
        "u": inputs["u"].transpose(1, 2).contiguous().transpose(1, 2),
        "delta": torch.stack((inputs["delta"], inputs["delta"]), -1)[..., 0],
        "A": inputs["A"].T.contiguous().T,
        "B": inputs["B"].to(memory_format=torch.channels_last),
        "C": inputs["C"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "D": torch.stack((inputs["D"], inputs["D"]), 1)[:, 0],
        "z": inputs["z"].view(2, 6, 6, 6).to(memory_format=torch.channels_last).flatten(2),
        "delta_bias": inputs["delta_bias"].flip(0).flip(0),
    }
    assert_same(with_gradients(scan_with_state, strided), expected)
    ones = {**inputs, "delta": torch.ones(1).expand(2, 6, 36), "z": None}
    outputs = with_gradients(scan_with_state, ones)
    assert_same(outputs, with_gradients(selective_scan_reference, ones))
    assert outputs["y"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, implementation: str) -> None:
    """Computed in float32; outputs and gradients come back in the dtype of what they belong to."""
    inputs = {name: x.to(dtype) for name, x in make_inputs(50).items()}
    outputs = with_gradients(scan_with_state, inputs)
    exact = with_gradients(selective_scan_reference, {name: x.float() for name, x in inputs.items()})
    assert outputs["last_state"].dtype == torch.float32
    for name, expected in exact.items():
        assert name == "last_state" or outputs[name].dtype == dtype
        assert_close(
            outputs[name].float(), expected.to(dtype).float(), rtol=2e-2, atol=2e-2 * expected.abs().max().item()
        )
    mixed = {**inputs, "A": inputs["A"].float(), "D": inputs["D"].float()}
    assert with_gradients(scan_with_state, mixed)["A"].dtype == torch.float32


def test_no_second_derivative(implementation: str) -> None:
    u = make_inputs()["u"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(**{**make_inputs(), "u": u}).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        gradient.sum().backward()


# The operator.


@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=str)
def test_operator_registration(without: tuple[str, ...], implementation: str) -> None:
    inputs = make_inputs(without=without)
    plain = (*inputs.values(), True)
    training = (*(None if x is None else x.clone().requires_grad_() for x in inputs.values()), True)
    torch.library.opcheck(torch.ops.zoo.selective_scan.default, plain)
    torch.library.opcheck(torch.ops.zoo.selective_scan.default, training)
    gradients = (inputs["u"], None, *plain)
    torch.library.opcheck(torch.ops.zoo.selective_scan_backward.default, gradients)


def test_compile_without_graph_breaks(implementation: str) -> None:
    inputs = make_inputs()
    compiled = torch.compile(scan_with_state, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, inputs), with_gradients(selective_scan_reference, inputs))


class Scan(nn.Module):
    """The scan with Mamba's parameters, as a layer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("A", "D", "delta_bias"):
            self.register_buffer(name, make_inputs()[name])

    def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        return selective_scan(u, delta, self.A, B, C, self.D, z, self.delta_bias, delta_softplus=True)


def sequences(batch: int) -> tuple[Tensor, ...]:
    inputs = make_inputs(batch=batch)
    return tuple(inputs[name] for name in ("u", "delta", "B", "C", "z"))


def batch_free() -> tuple[dict[int, Any], ...]:
    return ({0: torch.export.Dim("batch", min=1, max=64)},) * 5


def test_export_keeps_one_operator() -> None:
    program = torch.export.export(Scan(), sequences(2), dynamic_shapes=batch_free())
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.zoo.selective_scan.default in called
    assert_close(program.module()(*sequences(5)), Scan()(*sequences(5)))


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
def test_onnx(decomposed: bool, tmp_path: Path) -> None:
    """From the module, and from a program that was exported with the operator in it."""
    options = {"dynamo": True, "external_data": False}
    path = str(tmp_path / "scan.onnx")
    if decomposed:
        program = torch.export.export(Scan(), sequences(2), dynamic_shapes=batch_free())
        program = program.run_decompositions(onnx_decompositions())
        torch.onnx.export(program, (), path, **options)
    else:
        torch.onnx.export(Scan(), sequences(2), path, dynamic_shapes=batch_free(), **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for batch in (2, 5):
        feed = {name: x.numpy() for name, x in zip(names, sequences(batch), strict=True)}
        (y,) = session.run(None, feed)
        assert_close(torch.from_numpy(y), Scan()(*sequences(batch)), rtol=1e-5, atol=1e-5)


def test_counted_as_the_authors_do() -> None:
    from zoo.analysis.counts import count_forward

    counts = count_forward(Scan(), *sequences(2))
    assert counts.macs == (9 * 4 + 1) * 2 * 6 * 19
    assert counts.activations == 2 * 6 * 19


# The choice.


def test_default_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choose.variable, raising=False)
    monkeypatch.setattr(cpu.EXTENSION, "unavailable", lambda: None)
    monkeypatch.setattr(mamba, "unavailable", lambda: None)
    cuda = torch.device("cuda")
    assert choose(CPU).name == "cpu"
    assert choose(cuda).name == "mamba"
    assert choose(cuda, torch.float64).name == "torch"
    assert choose(torch.device("mps")).name == "torch"
    monkeypatch.setattr(mamba, "unavailable", lambda: "mamba-ssm is not installed")
    monkeypatch.setattr(util, "find_spec", lambda _: None)  # no Triton
    assert choose(cuda).name == "torch"
    assert choose(cuda).reason == "mamba-ssm is not installed and Triton is not installed"


def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, "tritn")
    with pytest.raises(ConfigError, match=r"ZOO_SELECTIVE_SCAN is 'tritn'; expected .* Did you mean: triton"):
        selective_scan(**make_inputs())


@pytest.mark.parametrize("name", ["triton", "mamba"])
def test_choice_that_cannot_run_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=f"ZOO_SELECTIVE_SCAN={name}, but "):
        selective_scan(**make_inputs())


def test_cpu_choice_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, "cpu")
    with pytest.raises(ConfigError, match="the tensors are on 'cuda'"):
        choose(torch.device("cuda"))


@pytest.mark.parametrize(
    ("missing", "why"),
    [("compiler", "no C\\+\\+ compiler"), ("ninja", "no ninja"), ("headers", "not built: Error building extension")],
)
def test_falls_back_where_nothing_can_be_built(
    missing: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if missing == "headers":
        broken = tmp_path / "broken.cpp"
        broken.write_text("#error nothing to build here\n")
        monkeypatch.setattr(cpu.EXTENSION, "source", broken)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    else:
        monkeypatch.setattr(_extension, missing, lambda: None)
    monkeypatch.delenv(choose.variable, raising=False)
    cpu.EXTENSION.forget()
    try:
        with caplog.at_level(logging.INFO, logger="zoo"):
            assert choose(CPU).name == choose(CPU).name == "torch"
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("selective_scan: no C++ kernel (")
        assert re.search(why, choose(CPU).reason)
        assert_same(
            with_gradients(scan_with_state, make_inputs()), with_gradients(selective_scan_reference, make_inputs())
        )
    finally:
        cpu.EXTENSION.forget()


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from zoo.cli import app

    monkeypatch.setenv(choose.variable, "torch")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    assert facts["operators"]["selective_scan on cpu"] == "torch: ZOO_SELECTIVE_SCAN=torch"
    assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(facts["tools"]) == {"C++ compiler", "ninja"}
    assert "selective_scan on cpu" in CliRunner().invoke(app, ["doctor"]).stdout
    monkeypatch.setenv(choose.variable, "fast")
    assert "none: ZOO_SELECTIVE_SCAN is 'fast'" in CliRunner().invoke(app, ["doctor"]).stdout


# The kernels for GPUs.


INTERPRETED = """
import test_selective_scan as tests
from zoo.ops.selective_scan import triton_impl
triton_impl.FORWARD_FEW = (64, 4)  # so that the longer of these has more than one tile
for size in ({"length": 70, "channels": 4, "states": 3}, {"length": 64, "batch": 1, "channels": 2, "groups": 1}):
    for without in ((), ("D", "z", "delta_bias")):
        inputs = tests.make_inputs(**size, without=without)
        expected = tests.with_gradients(tests.selective_scan_reference, inputs)
        tests.assert_same(tests.with_gradients(tests.scan_with_state, inputs), expected)
"""


@pytest.mark.slow
def test_triton_kernels_interpreted(interpret: Callable) -> None:
    """The Triton kernels' arithmetic, without a GPU."""
    interpret(INTERPRETED, choose.variable, timeout=540)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize("everything", [False, True])
def test_triton_kernels_compile(kernel: str, everything: bool, compile_kernel: Callable) -> None:
    """To machine code of a GPU that need not be there."""
    from zoo.ops.selective_scan import triton_impl

    function = getattr(triton_impl, kernel)
    optional = {"D", "z", "delta_bias", "grad_D", "grad_z", "grad_bias", "grad_last_state"}
    constants: dict[str, Any] = {"N": 16, "T": triton_impl.BACKWARD[0], "SOFTPLUS": everything}
    for name in inspect.signature(function.fn).parameters:
        if name.startswith("HAS_"):
            constants[name] = everything
        if name in optional and not everything:
            constants[name] = None
    integers = ("length", "channels", "channels_per_group", "states", "tiles")
    compile_kernel(function, constants, dict.fromkeys(integers, "i32"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, {"length": 784, "channels": 384, "states": 16, "groups": 4}], ids=str)
@pytest.mark.parametrize("without", [(), ("z",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("name", ["triton", "mamba"])
def test_on_a_gpu(name: str, size: dict[str, Any], without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if name == "mamba" and mamba.unavailable() is not None:
        pytest.skip(str(mamba.unavailable()))
    monkeypatch.setenv(choose.variable, name)
    inputs = make_inputs(**size, without=without)
    expected = with_gradients(selective_scan_reference, inputs)
    on_gpu = {key: None if x is None else x.cuda() for key, x in inputs.items()}
    if name == "mamba":  # which has no gradient for the last state
        y = selective_scan(**on_gpu, delta_softplus=True)
        assert_close(y.cpu(), expected["y"], rtol=1e-4, atol=1e-4)
        return
    assert_same(with_gradients(scan_with_state, on_gpu), expected)


def test_names_are_the_operators() -> None:
    arguments = [argument.name for argument in torch.ops.zoo.selective_scan.default._schema.arguments]
    assert tuple(arguments[:-1]) == NAMES
