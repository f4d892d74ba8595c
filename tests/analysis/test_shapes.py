"""Operators on shapes alone return what they return on tensors: the same shapes and dtypes, the same counts, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.analysis.counts import count_forward
from zoo.analysis.shapes import learnable, shapes_only
from zoo.layers import alike

OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(6, 4, 3, 3), stride=2, padding=1),
    "conv2d, groups": lambda x: F.conv2d(x, torch.ones(8, 2, 3, 5), None, (2, 1), (0, 2), (1, 2), 2),
    "conv2d, same": lambda x: F.conv2d(x, torch.ones(6, 4, 3, 3), padding="same"),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(4, 3, 3, 3), None, 2, 1, 1, 2),
    "linear": lambda x: F.linear(x, torch.ones(5, 10), torch.ones(5)),
    "matmul": lambda x: x @ torch.ones(1, 1, 10, 7),
    "matmul, vector": lambda x: x @ torch.ones(10),
    "bmm": lambda x: torch.bmm(x[0], torch.ones(4, 10, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(x, torch.ones(2, 4, 5, 10), torch.ones(2, 4, 5, 3)),
    "attention, grouped": lambda x: F.scaled_dot_product_attention(
        x, x[:, :2], x[:, :2], is_causal=True, enable_gqa=True
    ),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "layer norm": lambda x: F.layer_norm(x, (10,)),
    "add": lambda x: x + torch.ones(4, 1, 1),
    "add, larger": lambda x: torch.ones(3, 1, 1, 1, 1) + x,
    "integers times floats": lambda x: torch.arange(10) * x,
    "integers divided": lambda x: torch.arange(10) / 3,
    "integers, whole": lambda x: (torch.arange(12) // 5 - torch.arange(12) % 5).abs(),
    "right minus": lambda x: 1 - x,
    "right over": lambda x: 1 / (1 + x.exp()),
    "mean": lambda x: x.mean((2, -1), keepdim=True),
    "mean of all": lambda x: x.mean(),
    "sum": lambda x: x.sum(1),
    "softmax": lambda x: x.softmax(-1),
    "cat": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "cat, from the end": lambda x: torch.cat([x, x], -1),
    "stack": lambda x: torch.stack([x, x], -1),
    "stack, first": lambda x: torch.stack([x, x]),
    "table": lambda x: x[0, :, 0][:, torch.zeros(3, 5, dtype=torch.int64)],
    "slices": lambda x: x[:, 1:3, ::2],
    "embedding": lambda x: F.embedding(torch.zeros(2, 3, dtype=torch.int64), torch.ones(9, 4)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "avg_pool2d, ceil": lambda x: F.avg_pool2d(x, 3, 2, 0, True),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "interpolate, size": lambda x: F.interpolate(x, (3, 4)),
    "by torch's names": lambda x: torch.matmul(input=x.transpose(dim0=2, dim1=3), other=torch.ones(9, 2)),
    "transpose": lambda x: x.transpose(-2, 1),
    "flatten": lambda x: x.flatten(2),
    "flatten all": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "unflatten whole": lambda x: x.unflatten(-1, (5, 2)),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "chunk, uneven": lambda x: x.chunk(3, dim=1)[1],
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "made": lambda x: torch.full((2, 3), 1.5),
    "made of integers": lambda x: torch.full((2,), 1),
    "tensor": lambda x: torch.tensor([[1.0, 2.0]]),
    "ones": lambda x: torch.ones(2, 3, dtype=torch.float64),
    "zeros of a shape": lambda x: torch.zeros((2, 3)),
    "steps": lambda x: torch.arange(3, 20, 4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_as_on_tensors(name: str) -> None:
    operator = OPERATORS[name]

    class Operator(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return operator(x)

    expected = operator(torch.ones(2, 4, 9, 10))
    counts = count_forward(Operator(), torch.ones(2, 4, 9, 10))
    with shapes_only() as shapes:
        ours = operator(torch.empty(2, 4, 9, 10))
        assert ours.is_meta
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    assert (shapes.macs, shapes.activations) == (counts.macs, counts.activations)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: F.conv2d(x, torch.ones(6, 5, 3, 3)),
        lambda x: x + torch.ones(3, 1, 1),
        lambda x: x @ torch.ones(9, 3),
        lambda x: x.unflatten(1, (3, -1)),
    ],
)
def test_what_does_not_fit_is_an_error(operator: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError):
        operator(torch.ones(2, 4, 9, 10))
    with shapes_only(), pytest.raises(RuntimeError):
        operator(torch.empty(2, 4, 9, 10))


def test_equal_blocks_are_one_only_while_counting() -> None:
    made = [alike(nn.Linear, 3, 3, bias=False) for _ in range(2)]
    assert made[0] is not made[1]
    with shapes_only() as shapes:
        blocks = [alike(nn.Linear, 3, out, bias=False) for out in (3, 3, 3, 4)]
        assert blocks[0] is blocks[1] is blocks[2] is not blocks[3]
        model = nn.Sequential(*blocks)
        assert model(torch.empty(5, 3)).shape == (5, 4)
        assert learnable(model) == 3 * 9 + 12
        assert shapes.macs == 5 * (3 * 9 + 12)
        model(torch.empty(7, 3))
        assert shapes.macs == 12 * (3 * 9 + 12)
    assert not alike(nn.Linear, 3, 3, bias=False).weight.is_meta
