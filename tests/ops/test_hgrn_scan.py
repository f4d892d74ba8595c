"""The gated recurrence: every implementation against the reference, the operator, what it refuses, and its export."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from threads import torch_threads
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.errors import ConfigError, ShapeError
from zoo.ops import hgrn_scan
from zoo.ops._linear_scan import linear_scan
from zoo.ops.hgrn_scan import choose, cpu, hgrn_scan_reference, onnx_decompositions

CPU = torch.device("cpu")


def make_inputs(
    length: int = 19, *, batch: int = 2, width: int = 6, state: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    """Inputs by name, in the order of the signature."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "f": (2 * randn(batch, length, width) + 1).sigmoid(),
        "v": randn(batch, length, width),
        "initial_state": randn(batch, width) if state else None,
    }


def with_gradients(scan: Callable[..., Any], inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Both outputs and the gradients of a weighted sum of both, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    states, last_state = scan(**{**inputs, **leaves})
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (states, last_state)]
    loss = (states * weights[0].to(states)).sum() + (last_state * weights[1].to(last_state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"states": states, "last_state": last_state, **dict(zip(leaves, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        tolerance = 1e-5 * max(1.0, x.abs().max().item())
        assert_close(actual[name].to(x), x, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=["cpu", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the implementations for CPUs, forced."""
    missing = cpu.EXTENSION.unavailable()
    if request.param == "cpu" and missing is not None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must build the C++ kernel: {missing}")
        pytest.skip(missing)
    monkeypatch.setenv(choose.variable, request.param)
    assert choose(CPU).name == request.param
    return request.param


def test_by_hand(implementation: str) -> None:
    f = torch.tensor([0.5, 0.5, 0.25]).view(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    states, last_state = hgrn_scan(f, v, torch.tensor([[4.0]]))
    assert_close(states.flatten(), torch.tensor([3.0, 3.5, 3.875]))
    assert_close(last_state, torch.tensor([[3.875]]))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64, 100])
@pytest.mark.parametrize("dim", [-1, -2])
def test_linear_scan(length: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, length, generator=generator), torch.randn(2, 3, length, generator=generator)
    h, expected = torch.zeros(2, 3), []
    for t in range(length):
        h = a[..., t] * h + b[..., t]
        expected.append(h)
    assert_close(linear_scan(a.movedim(-1, dim), b.movedim(-1, dim), dim), torch.stack(expected, -1).movedim(-1, dim))


SIZES: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 63},
    {"length": 100, "width": 1},
    {"length": 100, "width": 63, "batch": 1},
    {"length": 5, "width": 1100, "batch": 1},
    {"length": 33, "width": 100, "batch": 3},
    {"length": 1100, "width": 1032, "batch": 1},  # so many that C++ writes them past the caches
    {"length": 1100, "width": 1030, "batch": 1},  # where rows are not aligned for that
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_equals_the_reference(size: dict[str, Any], state: bool, implementation: str) -> None:
    inputs = make_inputs(**size, state=state)
    assert_same(with_gradients(hgrn_scan, inputs), with_gradients(hgrn_scan_reference, inputs))


def test_in_two_halves(implementation: str) -> None:
    f, v, state = make_inputs(20).values()
    states, last_state = hgrn_scan(f, v, state)
    first, between = hgrn_scan(f[:, :7], v[:, :7], state)
    second, end = hgrn_scan(f[:, 7:], v[:, 7:], between)
    assert_close(torch.cat((first, second), 1), states)
    assert_close(end, last_state)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_gradcheck(state: bool, implementation: str) -> None:
    inputs = make_inputs(11, width=3, state=state, dtype=torch.float64)
    leaves = [None if x is None else x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(hgrn_scan, leaves)


@pytest.mark.parametrize("used", ["states", "last_state"])
def test_gradient_of_one_output(used: str, implementation: str) -> None:
    def one(**inputs: Any) -> Any:
        states, last_state = hgrn_scan(**inputs)
        return (states, last_state.detach()) if used == "states" else (states.detach(), last_state)

    def expected(**inputs: Any) -> Any:
        states, last_state = hgrn_scan_reference(**inputs)
        return (states, last_state.detach()) if used == "states" else (states.detach(), last_state)

    assert_same(with_gradients(one, make_inputs()), with_gradients(expected, make_inputs()))


def test_nothing_is_left_unwritten(implementation: str) -> None:
    inputs = make_inputs(37, width=18, state=False)
    expected = with_gradients(hgrn_scan_reference, inputs)
    torch.use_deterministic_algorithms(True)  # empty tensors are then filled with NaN
    try:
        assert_same(with_gradients(hgrn_scan, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads: int, implementation: str) -> None:
    inputs = make_inputs(12, batch=3, width=75)
    expected = with_gradients(hgrn_scan_reference, inputs)
    with torch_threads(threads):
        assert_same(with_gradients(hgrn_scan, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, implementation: str) -> None:
    """Computed in float32; outputs and gradients come back in the dtype of what they belong to."""
    inputs = {name: x.to(dtype) for name, x in make_inputs(63).items()}
    outputs = with_gradients(hgrn_scan, inputs)
    exact = with_gradients(hgrn_scan_reference, {name: x.float() for name, x in inputs.items()})
    assert outputs["last_state"].dtype == torch.float32
    assert_close(outputs["last_state"], exact["last_state"])
    for name, expected in exact.items():
        assert name == "last_state" or outputs[name].dtype == dtype
        assert_close(outputs[name].float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_strides(implementation: str) -> None:
    inputs = make_inputs(12)
    strided = {
        "f": inputs["f"].transpose(1, 2).contiguous().transpose(1, 2),
        "v": torch.stack((inputs["v"], inputs["v"]), -1)[..., 0],
        "initial_state": inputs["initial_state"].T.contiguous().T,
    }
    outputs = with_gradients(hgrn_scan, strided)
    assert_same(outputs, with_gradients(hgrn_scan_reference, inputs))
    assert outputs["states"].is_contiguous()


def test_nan_stays_in_its_column_and_its_future(implementation: str) -> None:
    inputs = make_inputs(70)
    inputs["v"][1, 40, 2] = float("nan")
    states, last_state = hgrn_scan(**inputs)
    assert states[1, 40:, 2].isnan().all()
    assert states.isnan().sum() == 30
    assert last_state.isnan().sum() == 1


@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}, {"width": 0}], ids=str)
def test_empty(size: dict[str, int], implementation: str) -> None:
    inputs = make_inputs(**size)
    outputs = with_gradients(hgrn_scan, inputs)
    assert outputs["states"].shape == inputs["v"].shape
    if "length" in size:
        assert torch.equal(outputs["last_state"], inputs["initial_state"])
        assert outputs["initial_state"].any()  # what comes through the last state
    assert not hgrn_scan(inputs["f"][:, :0], inputs["v"][:, :0])[1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(2, 6)}, r"v has shape \[2, 6\]; expected \[B, T, D\]"),
        ({"f": torch.zeros(2, 18, 6)}, r"f has shape \[2, 18, 6\]; expected that of v, \[2, 19, 6\]"),
        ({"f": torch.zeros(2, 1, 6)}, r"f has shape \[2, 1, 6\]"),
        ({"initial_state": torch.zeros(6)}, r"initial_state has shape \[6\]; expected \[B, D\], here \[2, 6\]"),
        ({"v": torch.zeros(2, 19, 6, dtype=torch.int64)}, r"v is torch.int64; expected a floating-point tensor"),
        ({"f": torch.zeros(2, 19, 6, dtype=torch.complex64)}, "f is complex"),
        ({"f": torch.zeros(2, 19, 6, device="meta")}, "f is on meta and v on cpu; expected one device"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["cpu", "ref"])
def test_refused(changes: dict[str, Tensor], message: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, name)
    with pytest.raises(ShapeError, match=message):
        hgrn_scan(**{**make_inputs(), **changes})


def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, "trition")
    with pytest.raises(ConfigError, match=r"ZOO_HGRN_SCAN is 'trition'; expected .* Did you mean: triton"):
        hgrn_scan(**make_inputs())


# The operator.


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_operator_registration(state: bool, implementation: str) -> None:
    inputs = make_inputs(state=state)
    plain = tuple(inputs.values())
    training = tuple(None if x is None else x.clone().requires_grad_() for x in plain)
    torch.library.opcheck(torch.ops.zoo.hgrn_scan.default, plain)
    torch.library.opcheck(torch.ops.zoo.hgrn_scan.default, training)
    gradients = (inputs["v"], None, inputs["f"], inputs["v"], inputs["initial_state"])
    torch.library.opcheck(torch.ops.zoo.hgrn_scan_backward.default, gradients)


def test_compile_without_graph_breaks(implementation: str) -> None:
    compiled = torch.compile(hgrn_scan, fullgraph=True, backend="aot_eager")
    for length in (1, 19):
        inputs = make_inputs(length)
        assert_same(with_gradients(compiled, inputs), with_gradients(hgrn_scan_reference, inputs))


class Scan(nn.Module):
    """The scan as a layer."""

    def forward(self, f: Tensor, v: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return hgrn_scan(f, v, initial_state)


def test_export_keeps_one_operator() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch})
    program = torch.export.export(Scan(), tuple(make_inputs().values()), dynamic_shapes=shapes)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.zoo.hgrn_scan.default in called
    others = tuple(make_inputs(30, batch=3).values())
    assert_close(program.module()(*others), Scan()(*others))


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
def test_onnx(decomposed: bool, tmp_path: Path) -> None:
    """From the module, and from a program that was exported with the operator in it."""
    inputs = tuple(make_inputs().values())
    options = {"dynamo": True, "external_data": False}
    path = str(tmp_path / "scan.onnx")
    if decomposed:
        program = torch.export.export(Scan(), inputs).run_decompositions(onnx_decompositions())
        torch.onnx.export(program, (), path, **options)
    else:
        torch.onnx.export(Scan().eval(), inputs, path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    outputs = [torch.from_numpy(x) for x in session.run(None, feed)]
    assert_close(outputs, list(Scan()(*inputs)), rtol=1e-5, atol=1e-5)


# The kernels for GPUs.

INTERPRETED = """
import torch
import test_hgrn_scan as tests
from zoo.ops.hgrn_scan import triton_impl
triton_impl.TILE |= {"T": 8, "D": 4}  # the interpreter takes its time for each element
for size in ({"length": 19, "width": 6}, {"length": 16, "batch": 1, "width": 4}, {"length": 2, "width": 1}):
    for state in (True, False):
        inputs = tests.make_inputs(**size, state=state)
        expected = tests.with_gradients(tests.hgrn_scan_reference, inputs)
        tests.assert_same(tests.with_gradients(tests.hgrn_scan, inputs), expected)
"""


@pytest.mark.slow
def test_triton_kernels_interpreted(interpret: Callable) -> None:
    """The Triton kernels' arithmetic, without a GPU."""
    interpret(INTERPRETED, choose.variable)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize("state", [False, True])
def test_triton_kernels_compile(kernel: str, state: bool, compile_kernel: Callable) -> None:
    """To machine code of a GPU that need not be there."""
    from zoo.ops.hgrn_scan import triton_impl

    constants = {name: triton_impl.TILE[name] for name in "TD"} | {"HAS_STATE": state}
    if not state:
        constants["initial_state"] = None
    compile_kernel(getattr(triton_impl, kernel), constants, dict.fromkeys(("length", "width", "tiles"), "i32"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, {"length": 2048, "width": 1024}], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_on_a_gpu(size: dict[str, Any], state: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    assert choose(torch.device("cuda")).name == "triton"
    inputs = make_inputs(**size, state=state)
    on_gpu = {key: None if x is None else x.cuda() for key, x in inputs.items()}
    expected = with_gradients(hgrn_scan_reference, inputs)
    assert_same({k: x.cpu() for k, x in with_gradients(hgrn_scan, on_gpu).items()}, expected)
