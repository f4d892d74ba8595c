"""The packed convolution is the plain one, whatever happens to its weight."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.layers import PackedConv2d, pack_convolutions

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


def test_only_what_can_be_and_pays_is_packed() -> None:
    model = nn.Sequential(
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(8, 8, 1),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding="same")),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(256, 256, 1),
    )
    pack_convolutions(model)
    layers = [layer for layer in model.modules() if not isinstance(layer, nn.Sequential)]
    assert [isinstance(layer, PackedConv2d) for layer in layers] == [True, False, False, False, False]
