"""Attention to a ragged cache: every implementation against the definition."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from zoo.errors import ConfigError, ShapeError
from zoo.ops.attend_rows import attend_rows, attend_rows_reference, choose


def case(
    rows: list[int],
    counts: list[int],
    heads: int = 6,
    key_heads: int = 2,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    keys, values = (torch.randn(5, 40, key_heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    q = torch.randn(len(rows), heads, width, dtype=dtype)
    return q, keys, values, torch.tensor(rows, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)


CASES = {
    "some": {"rows": [3, 0, 4], "counts": [40, 1, 17]},
    "all in order": {"rows": [0, 1, 2, 3, 4], "counts": [9, 9, 9, 9, 2]},
    "one query a key": {"rows": [2, 1], "counts": [33, 8], "heads": 2, "width": 7},
    "double": {"rows": [1, 1], "counts": [5, 6], "dtype": torch.float64},
    "none": {"rows": [], "counts": []},
}


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_implementations_are_the_definition(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_ATTEND_ROWS", kind)
    try:
        choose(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    inputs = case(**CASES[name])
    found = attend_rows(*inputs)
    tolerance = 1e-12 if inputs[0].dtype == torch.float64 else 2e-6
    assert_close(found, attend_rows_reference(*inputs), atol=tolerance, rtol=0)


def test_a_token_does_not_depend_on_the_others() -> None:
    if choose(torch.device("cpu")).name != "cpu":
        pytest.skip("bit by bit only in the kernel")
    q, keys, values, rows, counts = case([3, 0, 4], [40, 1, 17])
    together = attend_rows(q, keys, values, rows, counts)
    for i in range(3):
        alone = attend_rows(q[i : i + 1], keys, values, rows[i : i + 1], counts[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_gradients_and_half_precision() -> None:
    q, keys, values, rows, counts = case([3, 0, 4], [40, 1, 17])
    q.requires_grad_()
    attend_rows(q, keys, values, rows, counts).sum().backward()
    gradient, q.grad = q.grad, None
    attend_rows_reference(q, keys, values, rows, counts).sum().backward()
    assert_close(gradient, q.grad, atol=1e-5, rtol=0)
    half = attend_rows(*(each.bfloat16() for each in (q.detach(), keys, values)), rows, counts)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), attend_rows_reference(q, keys, values, rows, counts), atol=0.03, rtol=0)


def test_shapes_that_disagree() -> None:
    q, keys, values, rows, counts = case([3, 0], [40, 1])
    with pytest.raises(ShapeError, match=r"q is \[2, 6, 24\], keys .* expected \[N, H, K\]"):
        attend_rows(q, keys, values[..., :8], rows, counts)
    with pytest.raises(ShapeError, match="with a divisor of H"):
        attend_rows(q[:, :5], keys, values, rows, counts)


INTERPRETED = """
import test_attend_rows as tests
from zoo.ops.attend_rows import triton_impl

triton_impl.TILE |= {"C": 8}  # more than one tile of what is small
for name, sizes in tests.CASES.items():
    if name != "double":
        inputs = tests.case(**sizes)
        tests.assert_close(tests.attend_rows(*inputs), tests.attend_rows_reference(*inputs), atol=2e-6, rtol=0)
"""


@pytest.mark.slow
def test_triton_kernel_interpreted(interpret: Callable) -> None:
    """The Triton kernel's arithmetic, without a GPU."""
    interpret(INTERPRETED, choose.variable)


@pytest.mark.slow
def test_triton_kernel_compiles(compile_kernel: Callable) -> None:
    """To machine code of a GPU that need not be there."""
    from zoo.ops.attend_rows import triton_impl

    constants = {"G": 4, "W": 64, "C": triton_impl.TILE["C"]}
    strides = [f"{which}_{what}" for which in ("key", "value") for what in ("row", "head", "token")]
    types = {"rows": "*i64", "counts": "*i64", "scale": "fp32", **dict.fromkeys(("group", "width", *strides), "i32")}
    compile_kernel(triton_impl._kernel, constants, types)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if name != "double"])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    assert choose(torch.device("cuda")).name == "triton"
    q, keys, values, rows, counts = case(**CASES[name])
    q, keys, values = (each.to(dtype) for each in (q, keys, values))
    expected = attend_rows_reference(*(each.float() for each in (q, keys, values)), rows, counts)
    # The cache is not contiguous here either.
    found = attend_rows(q.cuda(), *(each.cuda() for each in (keys, values)), rows.cuda(), counts.cuda())
    assert found.dtype == dtype
    assert_close(found.float().cpu(), expected, atol=2e-5 if dtype == torch.float32 else 0.02, rtol=0)
