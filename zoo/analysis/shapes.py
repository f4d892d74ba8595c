"""Running a network on shapes alone: nothing is allocated, nothing is computed, and equal blocks run once.

PyTorch's own meta device does that too, but takes a fifth of a second for a network: it decomposes most operators in
Python. Here an operator is a few lines that say which shape it returns. What has none goes on to the meta device.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zoo.layers.alike import equal_once
from zoo.layers.init import skip_init

_REMEMBERED = 1000  # blocks; beyond it, all are forgotten
_blocks: dict[Any, nn.Module] = {}
_active: ContextVar["Shapes"] = ContextVar("shapes")


class OperatorCounter(TorchDispatchMode):
    """Sums MACs and written elements over the operators for which torch has a FLOP formula."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=out) // 2  # torch counts a multiply-accumulate as two FLOPs
            self.activations += (out if isinstance(out, Tensor) else out[0]).numel()
        return out


class Shapes(TorchFunctionMode):
    """While it is active, tensors are made on the meta device whatever was asked for, and operators return shapes.

    Attributes:
        macs, activations: Of all operators so far, as :class:`OperatorCounter` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.activations = 0
        self._others = OperatorCounter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            try:
                out = rule(self, *args, **kwargs)
            except TypeError:  # called in a way that the rule does not know
                out = NotImplemented
            if out is not NotImplemented:
                return out
        elif type(func) is _Attribute:
            return func(*args, **kwargs)
        counted = self._others
        macs, activations = counted.macs, counted.activations
        with counted:
            out = func(*args, **kwargs)
        self.macs += counted.macs - macs
        self.activations += counted.activations - activations
        return out

    def add(self, size: int, terms: int) -> None:
        """Count ``size`` elements, each a sum of so many products."""
        self.macs += size * terms
        self.activations += size


@contextmanager
def shapes_only() -> Iterator[Shapes]:
    """Within it, in this thread, networks are built and run on shapes alone, without gradients.

    Blocks that a family makes with :func:`zoo.layers.alike` are built once for equal arguments, and run once for equal
    shapes; they are remembered for the next network.
    """
    if len(_blocks) > _REMEMBERED:
        _blocks.clear()
    with torch.no_grad(), skip_init(), equal_once(_block), Shapes() as shapes:
        token = _active.set(shapes)
        try:
            yield shapes
        finally:
            _active.reset(token)


def forget() -> None:
    """Forget all blocks, as a benchmark has to."""
    _blocks.clear()


def learnable(model: nn.Module) -> int:
    """Parameters of a model that was built by :func:`shapes_only`: those of a block as often as it stands there."""
    known: dict[nn.Module, int] = {}

    def of(module: nn.Module) -> int:
        if module not in known:
            own = (each.numel() for each in module._parameters.values() if each is not None and each.requires_grad)
            known[module] = sum(own) + sum(of(child) for child in module._modules.values() if child is not None)
        return known[module]

    return of(model)


def _block(key: Any, make: Callable[[], nn.Module]) -> nn.Module:
    """The block that was made for an equal key, or a new one, whose passes are remembered."""
    if key in _blocks:
        return _blocks[key]
    block = make().eval()
    run: Callable[..., Any] = block.forward
    passes: dict[Any, tuple[Any, int, int]] = {}

    def forward(*args: Any) -> Any:
        if not all(arg is None or isinstance(arg, Tensor) for arg in args):
            return run(*args)
        shapes = _active.get()
        seen = tuple(arg if arg is None else arg.shape for arg in args)
        if seen not in passes:
            macs, activations = shapes.macs, shapes.activations
            out = run(*args)
            passes[seen] = out, shapes.macs - macs, shapes.activations - activations
            return out
        out, macs, activations = passes[seen]
        shapes.macs += macs
        shapes.activations += activations
        return out

    block.forward = forward  # type: ignore[method-assign]
    _blocks[key] = block
    return block


# ---------------------------------------------------------------------------------------------------------------------
# What operators return. A rule takes the mode and the operator's arguments; NotImplemented sends it to the meta device.

_Attribute = type(Tensor.shape.__get__)  # type: ignore[attr-defined]


def _empty(shape: Any, dtype: Any = None) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _same(_: Shapes, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _new(_: Shapes, *size: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if "size" in kwargs:
        return _empty(kwargs["size"], dtype)
    return _empty(size[0] if size and not isinstance(size[0], int) else size, dtype)


def _full(_: Shapes, size: Any, value: Any, dtype: Any = None, **kwargs: Any) -> Any:
    return _empty(size, dtype or torch.tensor(value).dtype)


def _tensor(_: Shapes, data: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(data, Tensor):
        return NotImplemented
    return torch.tensor(data, dtype=dtype, device="meta")


def _arange(_: Shapes, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if kwargs.get("out") is not None or not all(isinstance(arg, int) for arg in args):
        return NotImplemented
    return _empty(len(range(*args)), dtype or torch.int64)


def _combined(_: Shapes, a: Any, b: Any, **kwargs: Any) -> Any:
    """Of two tensors, or one and a number: broadcast."""
    if not isinstance(b, Tensor):
        return a
    if not isinstance(a, Tensor):
        return b
    first, second, dtype = a.shape, b.shape, torch.promote_types(a.dtype, b.dtype)
    if first == second or b.ndim == 0:
        return a if a.dtype == dtype else _empty(first, dtype)
    shape = _broadcast(first, second)
    return NotImplemented if shape is None else _empty(shape, dtype)


def _broadcast(first: Any, second: Any) -> tuple[int, ...] | None:
    rank = max(len(first), len(second))
    pairs = zip((1,) * (rank - len(first)) + (*first,), (1,) * (rank - len(second)) + (*second,), strict=True)
    shape = tuple(b if a == 1 else a for a, b in pairs)
    fits = all(
        side in (1, whole)
        for sides in (first, second)
        for side, whole in zip(sides, shape[rank - len(sides) :], strict=True)
    )
    return shape if fits else None


def _divided(mode: Shapes, a: Any, b: Any, **kwargs: Any) -> Any:
    return _combined(mode, a, b) if a.is_floating_point() and not kwargs else NotImplemented


def _transposed(_: Shapes, x: Tensor, first: int, second: int) -> Any:
    shape = list(x.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return _empty(shape, x.dtype)


def _flattened(_: Shapes, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.ndim, end_dim % x.ndim + 1
    return _empty((*x.shape[:start], math.prod(x.shape[start:end]), *x.shape[end:]), x.dtype)


def _unflattened(_: Shapes, x: Tensor, dim: int, sizes: Any) -> Any:
    known = math.prod(size for size in sizes if size != -1)
    dim, whole = dim % x.ndim, x.shape[dim]
    if sizes.count(-1) > 1 or whole % known or (-1 not in sizes and whole != known):
        return NotImplemented  # for torch to say what is wrong
    filled = (whole // known if size == -1 else size for size in sizes)
    return _empty((*x.shape[:dim], *filled, *x.shape[dim + 1 :]), x.dtype)


def _chunked(_: Shapes, x: Tensor, chunks: int, dim: int = 0) -> Any:
    shape = list(x.shape)
    if shape[dim] % chunks:
        return NotImplemented
    shape[dim] //= chunks
    return (_empty(shape, x.dtype),) * chunks


def _reduced(_: Shapes, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = {each % x.ndim for each in dims}
    return _empty([1 if i in gone else side for i, side in enumerate(x.shape) if keepdim or i not in gone], x.dtype)


def _joined(_: Shapes, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(each.shape[dim] for each in tensors)
    return _empty(shape, first.dtype)


def _stacked(_: Shapes, tensors: Any, dim: int = 0) -> Any:
    shape = list(tensors[0].shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return _empty(shape, tensors[0].dtype)


def _indexed(_: Shapes, x: Tensor, index: Any) -> Any:
    """``x[:, table]``, as attention biases are looked up; everything else is a view."""
    if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], Tensor):
        return _empty((x.shape[0], *index[1].shape, *x.shape[2:]), x.dtype)
    return NotImplemented


def _embedded(_: Shapes, tokens: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _empty((*tokens.shape, weight.shape[1]), weight.dtype)


def _linear(mode: Shapes, x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    out = _empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    mode.add(out.numel(), weight.shape[1])
    return out


def _matmul(mode: Shapes, a: Tensor, b: Tensor) -> Any:
    if a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    batch = _broadcast(a.shape[:-2], b.shape[:-2])
    if batch is None or a.shape[-1] != b.shape[-2]:
        return NotImplemented
    out = _empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
    mode.add(out.numel(), a.shape[-1])
    return out


def _attention(mode: Shapes, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Counted as its two matrix products, as papers do."""
    rows = q.numel() // q.shape[-1]
    mode.add(rows * k.shape[-2], q.shape[-1])
    mode.add(rows * v.shape[-1], k.shape[-2])
    return _empty((*q.shape[:-1], v.shape[-1]), q.dtype)


def _conv2d(
    mode: Shapes,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str):
        return NotImplemented
    sides = zip(x.shape[2:], weight.shape[2:], *map(_pair, (stride, padding, dilation)), strict=True)
    hw = [(side + 2 * pad - step * (kernel - 1) - 1) // by + 1 for side, kernel, by, pad, step in sides]
    if min(hw) < 1 or x.shape[1] != weight.shape[1] * groups:
        return NotImplemented  # for torch to say what is wrong
    out = _empty((x.shape[0], weight.shape[0], *hw), x.dtype)
    mode.add(out.numel(), math.prod(weight.shape[1:]))
    return out


def _conv_transpose2d(
    mode: Shapes,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    settings = map(_pair, (stride, padding, output_padding, dilation))
    hw = [
        (side - 1) * by - 2 * pad + step * (kernel - 1) + more + 1
        for side, kernel, by, pad, more, step in zip(x.shape[2:], weight.shape[2:], *settings, strict=True)
    ]
    out = _empty((x.shape[0], weight.shape[1] * groups, *hw), x.dtype)
    mode.macs += x.numel() * math.prod(weight.shape[1:])
    mode.activations += out.numel()
    return out


def _avg_pool2d(
    _: Shapes,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if ceil_mode:
        return NotImplemented
    sides = zip(x.shape[-2:], *map(_pair, (kernel_size, stride or kernel_size, padding)), strict=True)
    return _empty((*x.shape[:-2], *((side + 2 * pad - kernel) // by + 1 for side, kernel, by, pad in sides)), x.dtype)


def _adaptive_pool(_: Shapes, x: Tensor, output_size: Any) -> Any:
    return _empty((*x.shape[:-2], *_pair(output_size)), x.dtype)


def _interpolated(_: Shapes, x: Tensor, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(scale_factor, int | float):
        return NotImplemented
    return _empty((*x.shape[:2], *(int(side * scale_factor) for side in x.shape[2:])), x.dtype)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _rules() -> dict[Any, Callable[..., Any]]:
    same = "abs clamp exp log masked_fill neg sigmoid softmax contiguous __neg__ cos sin"
    in_place = "add_ clamp_ copy_ div_ erfinv_ exp_ fill_ mul_ normal_ uniform_ zero_"
    two = "add __add__ __radd__ __iadd__ mul __mul__ __rmul__ sub __sub__ __rsub__ remainder __mod__ floor_divide "
    two += "__floordiv__"
    rules: dict[Any, Callable[..., Any]] = {}
    rules |= dict.fromkeys([getattr(Tensor, name) for name in (same + " " + in_place).split()], _same)
    rules |= dict.fromkeys([getattr(Tensor, name) for name in two.split()], _combined)
    norms = [F.batch_norm, F.group_norm, F.layer_norm, F.rms_norm]
    pointwise = [F.relu, F.silu, F.gelu, F.hardswish, F.dropout, F.softmax, torch.sigmoid, torch.softmax]
    rules |= dict.fromkeys([*norms, *pointwise], _same)
    rules |= dict.fromkeys([torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn], _new)
    rules |= dict.fromkeys([Tensor.mean, Tensor.sum, Tensor.amax, torch.mean, torch.sum], _reduced)
    rules |= dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm], _matmul)
    rules |= {
        torch.full: _full,
        torch.tensor: _tensor,
        torch.arange: _arange,
        torch.cat: _joined,
        torch.stack: _stacked,
        Tensor.__getitem__: _indexed,
        Tensor.div: _divided,
        Tensor.__truediv__: _divided,
        Tensor.transpose: _transposed,
        Tensor.flatten: _flattened,
        Tensor.unflatten: _unflattened,
        Tensor.chunk: _chunked,
        F.embedding: _embedded,
        F.linear: _linear,
        F.scaled_dot_product_attention: _attention,
        F.conv2d: _conv2d,
        F.conv_transpose2d: _conv_transpose2d,
        F.avg_pool2d: _avg_pool2d,
        F.adaptive_avg_pool2d: _adaptive_pool,
        F.interpolate: _interpolated,
    }
    return rules


_RULES = _rules()
