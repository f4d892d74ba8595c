"""The packed layers are the plain ones, whatever happens to their weights."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from zoo.analysis.benchmark import torch_threads
from zoo.layers import PackedConv2d, PackedLinear, fuse_activation, pack
from zoo.layers.linear import PointLinear

CASES = [
    {"in_channels": 8, "out_channels": 12, "kernel_size": 1},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"in_channels": 8, "out_channels": 8, "kernel_size": (3, 5), "padding": (1, 2), "groups": 8},
    {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
]


def images(batch: int = 2, side: int = 9) -> Tensor:
    return torch.randn(batch, 8, side, side, generator=torch.Generator().manual_seed(0))


def pair(case: int = 1) -> tuple[nn.Conv2d, PackedConv2d]:
    torch.manual_seed(0)
    plain = nn.Conv2d(**CASES[case]).requires_grad_(False)  # type: ignore[arg-type]
    return plain, PackedConv2d.of(copy.deepcopy(plain))


def is_packed(conv: PackedConv2d) -> bool:
    return conv._packed is not None


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_outputs_at_every_size(case: int, memory_format: torch.memory_format) -> None:
    plain, packed = pair(case)
    with torch.inference_mode():
        for x in (images(), images(1), images(3, 17), images()):
            x = x.to(memory_format=memory_format)
            assert_close(packed(x), plain(x))
    assert is_packed(packed)


def test_follows_the_weight() -> None:
    plain, packed = pair()
    changes: list[Any] = [
        lambda conv: conv.weight.mul_(2),
        lambda conv: conv.load_state_dict({"weight": torch.ones_like(conv.weight)}),
        lambda conv: setattr(conv, "weight", nn.Parameter(torch.full_like(conv.weight, 3.0))),
        lambda conv: conv.double(),
        lambda conv: conv.float(),
    ]
    with torch.no_grad():
        packed(images())
        for change in changes:
            change(plain)
            change(packed)
            x = images().to(plain.weight.dtype)
            assert_close(packed(x), plain(x))


@torch.inference_mode()
@pytest.mark.parametrize("layer", [PackedConv2d(64, 64, 3, padding=1), PackedLinear(512, 512)])
def test_packs_anew_for_another_number_of_threads(layer: PackedConv2d | PackedLinear) -> None:
    """oneDNN lays weights out by it, and rearranges the wrong layout in every call, at several times the cost."""
    x = torch.randn(4, 64, 28, 28) if isinstance(layer, nn.Conv2d) else torch.randn(4, 512)
    with torch_threads(2):
        first = layer(x)
        of_two = layer._packed
        layer(x)
        assert layer._packed is of_two
    with torch_threads(1):
        assert_close(layer(x), first)
        assert layer._packed is not of_two


def test_what_is_packed_stays_out_of_copies_and_files() -> None:
    _, packed = pair()
    with torch.no_grad():
        expected = packed(images())
        twin = copy.deepcopy(packed)
        assert not is_packed(twin)
        assert list(packed.state_dict()) == ["weight"]
        assert torch.equal(twin(images()), expected)


def test_training_and_autocast_go_the_plain_way() -> None:
    plain, packed = pair()
    assert torch.equal(packed(images()), plain(images()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(images()).dtype == torch.bfloat16
    assert not is_packed(packed)
    packed.requires_grad_(True)
    packed(images()).sum().backward()
    assert packed.weight.grad is not None


def test_programs_hold_a_plain_convolution() -> None:
    _, packed = pair()
    program = torch.export.export(packed, (images(),))
    assert torch.ops.aten.conv2d.default in [node.target for node in program.graph.nodes]
    with torch.no_grad():
        traced = torch.jit.trace(packed, images())
        for form in (traced, torch.jit.script(packed), torch.compile(packed, backend="eager", fullgraph=True)):
            assert_close(form(images()), packed(images()))
    assert "_convolution_pointwise" not in str(traced.graph)


ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.SiLU(inplace=True)]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("side", [9, 256], ids=["matrix product", "oneDNN"])  # the two ways of a 1x1 convolution
def test_takes_over_the_activation(act: nn.Module, side: int) -> None:
    plain, _ = pair(0)
    packed = PackedConv2d.of(copy.deepcopy(plain), act)
    x = images(1, side).to(memory_format=torch.channels_last)
    expected = act(plain(x))
    with torch.no_grad():
        assert_close(packed(x), expected)
        scripted = torch.jit.script(packed)
        assert_close(scripted(x), expected)
    assert packed._packed is not None
    assert_close(packed(x), expected)  # with gradients: the plain way


def choose_onednn(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oneDNN multiply whatever it is, or nothing; the choice is by size and processor otherwise."""
    for name in ("_MIN_LINEAR_MACS", "_MIN_ACTIVATED_MACS", "_MIN_LINEAR_NUMEL"):
        monkeypatch.setattr(f"zoo.layers.packed.{name}", 0 if by_onednn else math.inf)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("by_onednn", [False, True], ids=["BLAS", "oneDNN"])
def test_linear(by_onednn: bool, act: nn.Module | None, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_onednn(by_onednn, monkeypatch)
    torch.manual_seed(0)
    plain, x = nn.Linear(24, 40), torch.randn(2, 7, 24)
    packed = PackedLinear.of(copy.deepcopy(plain), act)
    follow = act or nn.Identity()
    with torch.no_grad():
        for _ in range(2):
            for inputs in (x, x[:1], x[0, 0], x[:, ::2]):
                assert_close(packed(inputs), follow(plain(inputs)))
            plain.weight.mul_(2)
            packed.weight.mul_(2)
        assert packed._packed[4] == by_onednn
        assert copy.deepcopy(packed)._packed is None
        assert_close(torch.jit.script(packed)(x), follow(plain(x)))
    packed(x).sum().backward()
    assert packed.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["pruned", "parametrised"])
@pytest.mark.parametrize("plain", [nn.Conv2d(8, 8, 3), nn.Linear(8, 8)], ids=lambda plain: type(plain).__name__)
def test_parameters_made_of_others(plain: nn.Module, kind: str, name: str) -> None:
    packed = (PackedConv2d if isinstance(plain, nn.Conv2d) else PackedLinear).of(copy.deepcopy(plain))
    plain = copy.deepcopy(plain)
    x = torch.randn(2, 8, 8, 8)
    packed(x)
    for layer in (plain, packed):
        if kind == "pruned":
            prune.l1_unstructured(layer, name, 0.3)
        else:
            parametrize.register_parametrization(layer, name, nn.ReLU())
    assert_close(packed(x), plain(x))


@torch.inference_mode()
@pytest.mark.parametrize(("amx", "rows", "by_onednn"), [(False, 1, True), (True, 1, False), (True, 512, True)])
def test_few_rows_are_left_to_blas_with_amx(
    amx: bool, rows: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.layers.packed._HAS_AMX", amx)
    packed = PackedLinear(512, 512)
    packed(torch.randn(rows, 512))
    assert packed._packed[4] == by_onednn


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [None, nn.GELU()])
@pytest.mark.parametrize("by_onednn", [False, True], ids=["BLAS", "oneDNN"])
def test_a_linear_layer_adds_to_what_is_there(
    by_onednn: bool, act: nn.Module | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_onednn(by_onednn, monkeypatch)
    torch.manual_seed(0)
    plain, x = nn.Linear(24, 40, bias=bias), torch.randn(14, 24)
    packed = PackedLinear.of(plain, act)
    total = torch.randn(14, 40)
    expected = total + (act or nn.Identity())(plain(x))
    first = total.clone()
    assert packed.add_to(first, x) is first
    assert_close(first, expected)
    assert packed._packed[4] == by_onednn
    assert torch.equal(packed.add_to(total.clone(), x), first), "packed or not, the same bits"
    outputs: list[torch.Tensor] = []
    packed.register_forward_hook(lambda _, args, output: outputs.append(output))
    assert_close(packed.add_to(total, x), expected)
    assert packed.run(x) is not outputs[-1]
    assert_close(outputs[0], outputs[1])


def test_an_activation_that_onednn_has_not_stays() -> None:
    model = pack(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(approximate="tanh"), nn.Conv2d(8, 8, 1), nn.Sigmoid()))
    assert [type(layer) for layer in model] == [PackedConv2d, nn.GELU, PackedConv2d, nn.Sigmoid]


def test_one_activation_after_two_convolutions() -> None:
    relu = nn.ReLU()
    model = pack(nn.Sequential(nn.Conv2d(8, 8, 1), relu, nn.Conv2d(8, 8, 1), relu))
    assert [type(layer) for layer in model] == [PackedConv2d, nn.Identity, PackedConv2d, nn.Identity]
    assert model[0].act == model[2].act == "relu"


def test_fuse_activation_happens_once() -> None:
    block = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1), "linear": nn.Linear(8, 8), "act": nn.ReLU()})
    for _ in range(2):
        fuse_activation(block, "act", "conv", "linear")
        assert isinstance(block["act"], nn.Identity)
        assert [type(block["conv"]), type(block["linear"])] == [PackedConv2d, PackedLinear]
        assert block["conv"].act == block["linear"].act == "relu"


def test_what_can_be_packed_and_pays_is() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding="same")),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(8, 8, 1),
        nn.Linear(1024, 1024),
        nn.Linear(8, 8),
        PointLinear(8, 8),
        PointLinear(1024, 1024),
    )
    pack(model)
    layers = [layer for layer in model.modules() if not isinstance(layer, nn.Sequential)]
    assert [isinstance(layer, PackedConv2d | PackedLinear) for layer in layers] == [
        True,
        *[False] * 3,
        True,
        True,
        False,
        True,
    ]
