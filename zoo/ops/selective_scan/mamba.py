"""mamba-ssm's CUDA kernel (extra ``[cuda]``), behind the interface of the other implementations.

Its backward pass needs the states that its forward pass stored; they are computed again, so that nothing but the inputs
is kept in between. It gives the state after the last step, but takes no gradient for it.
"""

from functools import cache
from importlib import import_module, util
from types import ModuleType

from torch import Tensor

from zoo.errors import ShapeError, reason


@cache
def unavailable() -> str | None:
    """Why the kernel cannot be used; None when it can."""
    if util.find_spec("selective_scan_cuda") is None:
        return "mamba-ssm is not installed"
    try:
        _kernel()
    except Exception as error:  # a build for another version of CUDA or torch
        return f"mamba-ssm does not load: {reason(error)}"
    return None


def _kernel() -> ModuleType:
    return import_module("selective_scan_cuda")


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(*inputs: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.selective_scan.vectorised.forward`."""
    out, x, *gated = _kernel().fwd(*_contiguous(*inputs), delta_softplus)
    # x: [B, D, chunks, 2 N], the running product of decays and the state after each chunk in turn
    return (gated[0] if gated else out), x[:, :, -1, 1::2].contiguous()


def backward(
    grad_y: Tensor, grad_last_state: Tensor | None, *inputs: Tensor | None, delta_softplus: bool
) -> tuple[Tensor | None, ...]:
    """As :func:`zoo.ops.selective_scan.vectorised.backward`.

    Raises:
        ShapeError: If a gradient comes in for the last state.
    """
    if grad_last_state is not None:
        raise ShapeError("mamba-ssm's scan takes no gradient for the last state; ZOO_SELECTIVE_SCAN=triton does.")
    inputs = tuple(_contiguous(*inputs))
    z = inputs[6]
    kernel = _kernel()
    out, x, *_ = kernel.fwd(*inputs, delta_softplus)
    du, ddelta, dA, dB, dC, dD, dbias, *rest = kernel.bwd(
        *inputs, grad_y.contiguous(), x, None if z is None else out, None, delta_softplus, False
    )
    return du, ddelta, dA, dB, dC, dD, (None if z is None else rest[0]), dbias
