"""BitLinear: every implementation against a readable reference, packed weights, operators, and what is refused."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from threads import torch_threads
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.errors import ConfigError, ShapeError, WeightsError
from zoo.layers import BitLinear, PackedBitLinear, pack_bit_linears
from zoo.ops import _extension, bit_linear, packed_bit_linear
from zoo.ops.bit_linear import (
    bit_linear_reference,
    choose,
    cpu,
    onnx_decompositions,
    pack_ternary,
    pack_weight,
    unpack_ternary,
    vectorised,
)
from zoo.ops.bit_linear.reference import quantise_activations, quantise_weight, rms_norm, round_half_away

CPU = torch.device("cpu")


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(
    columns: int = 20, rows: int = 10, *, tokens: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs by name. No code lies close to where it would be rounded to another one, as far as float32 goes."""
    for seed in range(100):
        inputs = {
            "x": randn(*tokens, columns, seed=seed),
            "weight": 0.02 * randn(rows, columns, seed=seed + 1000),
            "norm_weight": 1 + 0.1 * randn(columns, seed=seed + 2000),
        }
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        x, weight, norm_weight = (each.double() for each in inputs.values())
        y = rms_norm(x, norm_weight, 1e-6)
        codes = y * 127 / y.abs().amax(-1, keepdim=True)
        ternary = weight / weight.abs().mean()
        margin = min((each.abs() % 1 - 0.5).abs().min().item() for each in (codes, ternary))
        if margin > 1e-5:
            return inputs
    raise AssertionError("no such inputs")


def with_gradients(linear: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of a weighted sum of it, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = linear(**leaves)
    gradients = torch.autograd.grad((out * randn(*out.shape, seed=1).to(out)).sum(), list(leaves.values()))
    return {"out": out, **dict(zip(leaves, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        tolerance = 1e-5 * max(1.0, x.abs().max().item())
        assert_close(actual[name].to(x), x, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=["cpu", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the implementations for CPUs, forced."""
    if request.param == "cpu":
        need_kernel()
    monkeypatch.setenv(choose.variable, request.param)
    assert choose(CPU).name == request.param
    return request.param


def need_kernel() -> None:
    missing = cpu.EXTENSION.unavailable()
    if missing is not None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must build the C++ kernel: {missing}")
        pytest.skip(missing)


# The reference.


def test_rounding() -> None:
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 1.4999999, 126.5, 127.49999, 0.0, -0.3])
    expected = torch.tensor([1.0, -1, 2, 3, -3, 0, 1, 127, 127, 0, 0])
    assert torch.equal(round_half_away(x), expected)
    assert torch.equal(round_half_away(x.double()), expected.double())


@pytest.mark.parametrize("name", ["ref", "cpu", "torch"])
def test_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mean|W| is 1, so W becomes [1, -1, 0] and [0, 1, -1]; the norm divides by the root of 14 / 3."""
    monkeypatch.setenv(choose.variable, name)
    if name == "cpu":
        need_kernel()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    weight = torch.tensor([[2.0, -0.6, 0.2], [0.2, 1.0, -2.0]])
    step = 3 / (14 / 3) ** 0.5 / 127  # 1 and 2 become 42.33 and 84.67 steps, so 42 and 85
    expected = step * torch.tensor([[42.0 - 85.0, 85.0 - 127.0]])
    assert_close(bit_linear(x, weight, torch.ones(3), eps=0.0), expected)


def test_gradients_go_straight_through() -> None:
    """dW = dout^T q and dy = dout W_q, each put together by hand."""
    inputs = make_inputs(dtype=torch.float64)
    x, weight, norm_weight = inputs.values()
    gradients = with_gradients(bit_linear_reference, inputs)
    grad = randn(2, 3, 10, seed=1)
    y = rms_norm(x, norm_weight, 1e-6).detach()
    codes, step = quantise_activations(y)
    ternary, scale = quantise_weight(weight)
    assert_close(gradients["weight"], torch.einsum("bto,bti->oi", grad, codes * step))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(leaf, norm_weight, 1e-6), leaf, grad @ (ternary * scale))
    assert_close(gradients["x"], expected)


# Every implementation.

SIZES: list[dict[str, Any]] = [
    {"columns": 1, "rows": 1},
    {"columns": 63, "rows": 100},
    {"columns": 100, "rows": 63, "tokens": (1,)},
    {"columns": 64, "rows": 4, "tokens": (5,)},
    {"columns": 600, "rows": 33, "tokens": (1, 7)},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size: dict[str, Any], implementation: str) -> None:
    inputs = make_inputs(**size)
    assert_same(with_gradients(bit_linear, inputs), with_gradients(bit_linear_reference, inputs))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_equals_unpacked(size: dict[str, Any], implementation: str) -> None:
    x, weight, norm_weight = make_inputs(**size).values()
    packed, scale = pack_weight(weight)
    expected = bit_linear_reference(x, weight, norm_weight)
    for grad in (True, False):  # through the operator, and past it
        with torch.set_grad_enabled(grad):
            out = packed_bit_linear(x, packed, scale, norm_weight, out_features=len(weight))
        assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_float64(implementation: str) -> None:
    inputs = make_inputs(dtype=torch.float64)
    if implementation == "cpu":  # which computes in float32; by itself float64 goes elsewhere
        return
    outputs = with_gradients(bit_linear, inputs)
    expected = with_gradients(bit_linear_reference, inputs)
    for name, x in expected.items():
        assert_close(outputs[name], x, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, implementation: str) -> None:
    """Computed in float32; the output and the gradients come back in the dtype of what they belong to."""
    inputs = make_inputs(63, dtype=dtype)
    outputs = with_gradients(bit_linear, inputs)
    exact = with_gradients(bit_linear_reference, {name: x.float() for name, x in inputs.items()})
    for name, expected in exact.items():
        assert outputs[name].dtype == dtype
        assert_close(outputs[name].float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    packed, scale = pack_weight(inputs["weight"])
    out = packed_bit_linear(inputs["x"], packed, scale, inputs["norm_weight"], out_features=10)
    assert out.dtype == dtype
    assert_close(out, outputs["out"])


def test_nothing_but_the_inputs_is_kept(implementation: str) -> None:
    kept: list[Tensor] = []
    inputs = {name: x.requires_grad_() for name, x in make_inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        bit_linear(**inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs.values()}


def test_frozen_weight(implementation: str) -> None:
    inputs = make_inputs()
    expected = with_gradients(bit_linear_reference, inputs)
    x = inputs["x"].clone().requires_grad_()
    out = bit_linear(x, inputs["weight"], inputs["norm_weight"])
    (gradient,) = torch.autograd.grad((out * randn(2, 3, 10, seed=1).to(out)).sum(), x)
    assert_close(gradient, expected["x"])


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads: int, tokens: int, implementation: str) -> None:
    x, _, norm_weight = make_inputs(600, tokens=(tokens,)).values()
    weight = 0.02 * torch.randint(-1, 2, (602, 600), generator=torch.Generator().manual_seed(0))
    expected = bit_linear_reference(x, weight, norm_weight)
    packed, scale = pack_weight(weight)
    with torch_threads(threads), torch.no_grad():
        out = packed_bit_linear(x, packed, scale, norm_weight, out_features=602)
    assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_strides(implementation: str) -> None:
    inputs = make_inputs(36)
    strided = {
        "x": inputs["x"].transpose(0, 2).contiguous().transpose(0, 2),
        "weight": inputs["weight"].T.contiguous().T,
        "norm_weight": torch.stack((inputs["norm_weight"],) * 2, 1)[:, 0],
    }
    assert_same(with_gradients(bit_linear, strided), with_gradients(bit_linear_reference, inputs))
    packed, scale = pack_weight(inputs["weight"])
    out = packed_bit_linear(strided["x"], packed, scale, strided["norm_weight"], out_features=10)
    assert out.is_contiguous()
    assert_close(out, bit_linear_reference(**inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_token(bad: float, implementation: str) -> None:
    inputs = make_inputs()
    inputs["x"][1, 2, 5] = bad
    out = bit_linear(**inputs)
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 10


def test_zeros(implementation: str) -> None:
    inputs = make_inputs()
    inputs["x"].zero_()
    assert not bit_linear(**inputs).any()
    inputs = make_inputs()
    inputs["weight"].zero_()
    assert not bit_linear(**inputs).any()


@pytest.mark.parametrize("tokens", [(0,), (3, 0)], ids=str)
def test_no_tokens(tokens: tuple[int, ...], implementation: str) -> None:
    inputs = {"x": torch.zeros(*tokens, 20), **{k: v for k, v in make_inputs().items() if k != "x"}}
    outputs = with_gradients(bit_linear, inputs)
    assert outputs["out"].shape == (*tokens, 10)
    assert not outputs["weight"].any()


# Packed weights.


@pytest.mark.parametrize("rows", [1, 4, 7, 1030])
def test_packing_and_back(rows: int) -> None:
    ternary = torch.randint(-1, 2, (rows, 5), generator=torch.Generator().manual_seed(0))
    packed = pack_ternary(ternary)
    assert packed.shape == (-(-rows // 4), 5)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_ternary(packed, rows).long(), ternary)


def test_layout_is_that_of_transformers() -> None:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    ternary = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pack_ternary(ternary), bitnet.pack_weights(ternary.clone()))


def test_kernels_are_exact() -> None:
    """In int32, on every instruction set that this processor has, at the largest sums that there are."""
    need_kernel()
    ops = torch.ops.zoo_cpu
    one_token = ((1, 1, 1), (130, 10, 1), (130, 33, 1), (577, 41, 1), (2**17, 7, 1), (2**17, 17, 1))
    for columns, rows, tokens in (*one_token, (31, 5, 3), (64, 8, 4), (513, 9, 5), (7000, 6, 2)):
        ternary = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(0))
        codes = torch.randint(-128, 128, (tokens, columns), generator=torch.Generator().manual_seed(1))
        ones = torch.ones_like(ternary)
        for weights in (ternary, ones, -ones):
            for activations in (codes, torch.full_like(codes, -128), torch.full_like(codes, 127)):
                for kernel, name in enumerate(cpu.kernels()):
                    product = ops.packed_product(activations.to(torch.int8), pack_ternary(weights), rows, kernel)
                    assert torch.equal(product.long(), activations @ weights.T), name
    assert cpu.kernels()[-1] == "portable C++"
    with pytest.raises(RuntimeError, match="no kernels"):
        ops.packed_product(codes.to(torch.int8), pack_ternary(ternary), rows, len(cpu.kernels()))


def test_a_step_computes_as_torch() -> None:
    """Where it does not, with another torch or processor, a step falls back on torch's operators, which are slower."""
    need_kernel()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("written after torch's kernels for AVX2 and AVX-512")
    assert torch.ops.zoo_cpu.matmulfree_step_is_as_torch()


def test_codes_are_the_references() -> None:
    need_kernel()
    x, weight, norm_weight = make_inputs(600, tokens=(4, 5)).values()
    codes, step = torch.ops.zoo_cpu.quantise_activations(x, norm_weight, 1e-6)
    expected, expected_step = quantise_activations(rms_norm(x, norm_weight, 1e-6))
    assert torch.equal(codes.float(), expected)
    assert_close(step, expected_step)
    packed, scale = pack_weight(weight)
    assert torch.equal(torch.ops.zoo_cpu.pack_ternary(weight, scale), packed)


def test_more_inputs_than_sums_are_exact_for() -> None:
    weight = torch.zeros(1, 2**17 + 1)
    packed, scale = torch.zeros(1, 2**17 + 1, dtype=torch.uint8), torch.tensor(1.0)
    for refused in (
        lambda: pack_weight(weight),
        lambda: bit_linear(weight, weight, weight[0]),
        lambda: packed_bit_linear(weight, packed, scale, weight[0], out_features=1),
    ):
        for grad in (True, False):  # through the operator, and past it
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(ShapeError, match="131073 inputs; expected at most 131072"),
            ):
                refused()


def test_packing_refuses_nan() -> None:
    weight = make_inputs()["weight"]
    weight[3, 4] = float("nan")
    with pytest.raises(WeightsError, match="NaN or infinity"):
        pack_weight(weight)
    layer = BitLinear(20, 10)
    layer.weight.data = weight
    model = nn.Sequential(BitLinear(20, 20), layer)
    with pytest.raises(WeightsError, match=r"^1: The weight is not finite"):
        pack_bit_linears(model)
    assert type(model[0]) is BitLinear


# Layers.


def test_layer() -> None:
    layer = BitLinear(5, 7)
    assert isinstance(layer, nn.Linear)
    assert sorted(layer.state_dict()) == ["norm.weight", "weight"]
    assert layer(torch.ones(2, 3, 5)).shape == (2, 3, 7)


def test_packed_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(20, 30), nn.Tanh(), nn.ModuleDict({"inner": BitLinear(30, 9)})["inner"])
    x = randn(4, 20).float()
    expected = model(x)
    assert pack_bit_linears(model) is model
    assert type(model[2]) is PackedBitLinear
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert sorted(model[0].state_dict()) == ["norm.weight", "packed", "scale"]
    assert model[0].packed.numel() == 8 * 20
    fresh = PackedBitLinear(20, 30)
    assert not fresh(x).any()
    fresh.load_state_dict(model[0].state_dict())
    assert torch.equal(fresh(x), model[0](x))
    with pytest.raises(ConfigError, match=r"^Linear has no BitLinear to pack"):
        pack_bit_linears(nn.Linear(2, 2))


def test_packed_layer_in_half_precision() -> None:
    layer = PackedBitLinear.of(BitLinear(20, 30))
    scale = layer.scale.clone()
    half = layer.to(torch.bfloat16)
    assert half.norm.weight.dtype == torch.bfloat16
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.scale, scale)
    assert half(torch.ones(1, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 21)}, r"x has shape \[3, 21\]; expected \[\.\.\., 20\]"),
        ({"x": torch.tensor(1.0)}, r"x has shape \[\]; expected \[\.\.\., 20\]"),
        ({"weight": torch.zeros(20)}, r"weight has shape \[20\]; expected \[Cout, Cin\]"),
        ({"norm_weight": torch.zeros(19)}, r"norm_weight has shape \[19\]; expected \[20\]"),
        ({"x": torch.zeros(3, 20, dtype=torch.int64)}, r"x is torch.int64; expected a floating-point tensor"),
        ({"x": torch.zeros(3, 20, device="meta")}, r"weight is on cpu and x on meta; expected one device"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["torch", "ref"])
def test_refused(changes: dict[str, Tensor], message: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, name)
    with pytest.raises(ShapeError, match=message):
        bit_linear(**{**make_inputs(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packed": torch.zeros(3, 20)},
            r"packed is torch.float32 of shape \[3, 20\]; expected torch.uint8 \[3, Cin\]",
        ),
        ({"out_features": 13}, r"expected torch.uint8 \[4, Cin\] for 13 outputs"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\]; expected one number"),
        ({"x": torch.zeros(1, 19)}, r"x has shape \[1, 19\]; expected \[\.\.\., 20\]"),
    ],
    ids=str,
)
def test_packed_refused(changes: dict[str, Any], message: str) -> None:
    x, weight, norm_weight = make_inputs().values()
    packed, scale = pack_weight(weight)
    inputs = {"x": x, "packed": packed, "scale": scale, "norm_weight": norm_weight, "out_features": 10}
    for grad in (True, False):  # through the operator, and past it
        with torch.set_grad_enabled(grad), pytest.raises(ShapeError, match=message):
            packed_bit_linear(**{**inputs, **changes})


def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, "cpp")
    with pytest.raises(ConfigError, match=r"ZOO_BIT_LINEAR is 'cpp'; expected ref, cpu, triton, torch"):
        bit_linear(**make_inputs())


def test_kernels_that_compute_in_float32_refuse_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.variable, "cpu")
    inputs = {name: value.double() for name, value in make_inputs().items()}
    with pytest.raises(
        ConfigError, match="ZOO_BIT_LINEAR=cpu, but it computes in float32 and the tensors are in float64"
    ):
        bit_linear(**inputs)


def test_falls_back_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_extension, "compiler", lambda: None)
    monkeypatch.delenv(choose.variable, raising=False)
    cpu.EXTENSION.forget()
    try:
        with caplog.at_level(logging.INFO, logger="zoo"):
            assert choose(CPU).name == "torch"
        assert re.search("no C\\+\\+ compiler", choose(CPU).reason)
        assert caplog.messages == ["bit_linear: no C++ kernel (no C++ compiler); using vectorised PyTorch"]
        x, weight, norm_weight = make_inputs().values()
        packed, scale = pack_weight(weight)
        out = packed_bit_linear(x, packed, scale, norm_weight, out_features=10)
        assert_close(out, bit_linear_reference(x, weight, norm_weight))
    finally:
        cpu.EXTENSION.forget()


def test_tokens_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorised, "TOKENS", 4)
    inputs = make_inputs()
    assert_same(with_gradients(bit_linear, inputs), with_gradients(bit_linear_reference, inputs))


def test_slices_of_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorised, "SLICE", 3)
    x, weight, norm_weight = make_inputs(20, 30).values()
    packed, scale = pack_weight(weight)
    out = vectorised.packed_forward(x, packed, scale, norm_weight, 30, 1e-6)
    assert_close(out, bit_linear_reference(x, weight, norm_weight))


def test_doctor_names_every_operator() -> None:
    from zoo.cli.doctor import examine

    operators = examine()["operators"]
    named = {name.partition(" ")[0] for name in operators}
    assert named == {"selective_scan", "hgrn_scan", "bit_linear", "attend_rows"}
    need_kernel()
    assert cpu.kernels()[0] in operators["bit_linear on cpu"]


# The operators.


def test_operator_registration(implementation: str) -> None:
    inputs = make_inputs()
    x, weight, norm_weight = inputs.values()
    packed, scale = pack_weight(weight)
    training = tuple(each.clone().requires_grad_() for each in inputs.values())
    torch.library.opcheck(torch.ops.zoo.bit_linear.default, (x, weight, norm_weight, 1e-6))
    torch.library.opcheck(torch.ops.zoo.bit_linear.default, (*training, 1e-6))
    gradients = (torch.ones(2, 3, 10), x, weight, norm_weight, 1e-6, True)
    torch.library.opcheck(torch.ops.zoo.bit_linear_backward.default, gradients)
    torch.library.opcheck(torch.ops.zoo.packed_bit_linear.default, (x, packed, scale, norm_weight, 10, 1e-6))


def test_compile_without_graph_breaks(implementation: str) -> None:
    compiled = torch.compile(bit_linear, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    assert_same(with_gradients(compiled, inputs), with_gradients(bit_linear_reference, inputs))
    layer = PackedBitLinear.of(BitLinear(20, 10))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(inputs["x"]), layer(inputs["x"]))


def test_export_keeps_one_operator() -> None:
    layer = PackedBitLinear.of(BitLinear(20, 10))
    x = make_inputs()["x"]
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.zoo.packed_bit_linear.default]
    assert_close(program.module()(torch.cat((x, x, x))), layer(torch.cat((x, x, x))))


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_onnx(packed: bool, decomposed: bool, tmp_path: Path) -> None:
    """From the module, and from a program that was exported with the operator in it."""
    inputs = make_inputs()
    x = inputs["x"]
    layer: nn.Module = BitLinear(20, 10)
    layer.weight.data, layer.norm.weight.data = inputs["weight"], inputs["norm_weight"]
    layer = (PackedBitLinear.of(layer) if packed else layer).eval()
    options = {"dynamo": True, "external_data": False}
    path = str(tmp_path / "linear.onnx")
    if decomposed:
        program = torch.export.export(layer, (x,)).run_decompositions(onnx_decompositions())
        torch.onnx.export(program, (), path, **options)
    else:
        torch.onnx.export(layer, (x,), path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_counted_as_a_linear_layer() -> None:
    from zoo.analysis.counts import count_forward

    x = make_inputs()["x"]
    assert count_forward(BitLinear(20, 10), x).macs == 2 * 3 * 20 * 10
    assert count_forward(PackedBitLinear(20, 10), x).macs == 2 * 3 * 20 * 10


# The kernels for GPUs.

INTERPRETED = """
import torch
import test_bit_linear as tests
from zoo.ops.bit_linear import triton_impl
triton_impl.FEW_TILE |= {"R": 4, "K": 16}  # more than one tile of what is small
triton_impl.MANY_TILES[0][1].update({"M": 16, "R": 16, "K": 32})
for size in ({"columns": 37, "rows": 23}, {"columns": 70, "rows": 90, "tokens": (33,)}, {"columns": 1, "rows": 1}):
    inputs = tests.make_inputs(**size)
    expected = tests.with_gradients(tests.bit_linear_reference, inputs)
    tests.assert_same(tests.with_gradients(tests.bit_linear, inputs), expected)
    packed, scale = tests.pack_weight(inputs["weight"])
    out = tests.packed_bit_linear(inputs["x"], packed, scale, inputs["norm_weight"], out_features=size["rows"])
    tests.assert_close(out, expected["out"], rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
def test_triton_kernels_interpreted(interpret: Callable) -> None:
    """The Triton kernels' arithmetic, without a GPU."""
    interpret(INTERPRETED, choose.variable)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_quantise_kernel", "_few_kernel", "_many_kernel"])
def test_triton_kernels_compile(kernel: str, compile_kernel: Callable) -> None:
    """To machine code of a GPU that need not be there."""
    from zoo.ops.bit_linear import triton_impl

    constants = {
        "_quantise_kernel": {"K": 4096},
        "_few_kernel": {name: triton_impl.FEW_TILE[name] for name in "RK"},
        "_many_kernel": {name: triton_impl.MANY_TILES[-1][1][name] for name in "MRK"},
    }[kernel]
    integers = dict.fromkeys(("tokens", "packed_rows", "rows", "columns"), "i32")
    types = {"codes": "*i8", "packed": "*u8", "sums": "*i32", "eps": "fp32", **integers}
    compile_kernel(getattr(triton_impl, kernel), constants, types)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_a_gpu(size: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    assert choose(torch.device("cuda")).name == "triton"
    inputs = make_inputs(**{**size, "columns": min(size["columns"], 600)})
    expected = with_gradients(bit_linear_reference, inputs)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    assert_same({k: x.cpu() for k, x in with_gradients(bit_linear, on_gpu).items()}, expected)
    packed, scale = pack_weight(on_gpu["weight"])
    out = packed_bit_linear(on_gpu["x"], packed, scale, on_gpu["norm_weight"], out_features=size["rows"])
    assert_close(out.cpu(), expected["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 9, 200, 512, 4000])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 2816), (2050, 1000)])
def test_products_on_a_gpu_are_exact(rows: int, columns: int, tokens: int) -> None:
    """At sizes at which some activation is always near where it rounds to another code: so the codes are given."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    codes = torch.randint(-127, 128, (tokens, columns), device="cuda").float()
    codes[:, 0] = 127
    norm_weight = codes.square().mean(-1, keepdim=True).sqrt()  # of each token: the norm divides by it
    weight = torch.randint(-1, 2, (rows, columns), device="cuda").float()
    packed, scale = pack_weight(weight)
    ones = torch.ones(columns, device="cuda")
    out = packed_bit_linear(codes, packed, scale, ones, out_features=rows, eps=0.0)
    exact = codes.double() @ weight.double().T / norm_weight.double()
    assert_close(out.double() / scale.double(), exact, rtol=1e-5, atol=1e-6)
