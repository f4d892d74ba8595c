"""BitLinear: the reference by hand, every implementation against it, packing, and what it refuses."""

import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.layers import BitLinear
from zoo.ops import bit_linear
from zoo.ops.bit_linear.reference import round_half_away


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_rounding() -> None:
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 1.4999999, 126.5, 127.49999, 0.0, -0.3])
    expected = torch.tensor([1.0, -1, 2, 3, -3, 0, 1, 127, 127, 0, 0])
    assert torch.equal(round_half_away(x), expected)
    assert torch.equal(round_half_away(x.double()), expected.double())


def test_by_hand() -> None:
    """mean|W| is 1, so W becomes [1, -1, 0] and [0, 1, -1]; the norm divides by the root of 14 / 3."""
    x = torch.tensor([[1.0, 2.0, 3.0]])
    weight = torch.tensor([[2.0, -0.6, 0.2], [0.2, 1.0, -2.0]])
    step = 3 / (14 / 3) ** 0.5 / 127  # 1 and 2 become 42.33 and 84.67 steps, so 42 and 85
    expected = step * torch.tensor([[42.0 - 85.0, 85.0 - 127.0]])
    assert_close(bit_linear(x, weight, torch.ones(3), eps=0.0), expected)


def test_layer() -> None:
    layer = BitLinear(5, 7)
    assert isinstance(layer, torch.nn.Linear)
    assert sorted(layer.state_dict()) == ["norm.weight", "weight"]
    assert layer(randn(2, 3, 5)).shape == (2, 3, 7)
