"""One forward pass as a list of operators: what each computes, reads and writes, in which module, and how long it took.

A trace runs on any device: on the meta device it costs nothing, on a real one operators can be timed. What is counted:

* MACs: multiply-accumulates of convolutions, linear layers, matrix products, attention (as its two matrix products) and
  of every operator that has a formula in torch's registry, as ``zoo::selective_scan`` has. Norms, activation functions,
  softmax, pooling, additions, sorting and gathering have none: they are counted as elements read and written.
* Elements: each operator reads its tensors once and writes its results once. Views move nothing. This is the least that
  an unfused implementation moves; caches may serve a part of it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from zoo.analysis.benchmark import CLOCKS, as_current

# Operators whose result is a new look at old memory, although their schema does not say so; empty memory; and what
# packs a weight, once.
_FREE = {
    *("_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"),
    *("to_mkldnn", "mkldnn_reorder_conv2d_weight", "_reorder_linear_weight"),
}

_KINDS = {
    "matmul": "mm addmm bmm baddbmm linear mv dot _linear_pointwise",
    "norm": "native_batch_norm _native_batch_norm_legit_no_training native_layer_norm native_group_norm "
    "cudnn_batch_norm _fused_rms_norm rms_norm",
    "softmax": "_softmax _log_softmax",
    "pool": "avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices max_pool2d mean amax sum "
    "cumsum",
    "routing": "sort topk argsort gather scatter scatter_ scatter_add index_select index index_put index_put_",
    "copy": "clone copy_ cat stack _to_copy contiguous constant_pad_nd roll repeat embedding fill_ zeros zeros_like "
    "new_zeros ones full full_like arange upsample_bilinear2d upsample_nearest2d upsample_bicubic2d",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Operator:
    """One call of an operator. Sizes are in elements, time in seconds."""

    module: str  # path of the innermost module that called it; "" is the model itself
    name: str  # for example "aten::convolution"
    kind: str  # "conv", "depthwise conv", "matmul", "attention", "scan", "norm", "elementwise", ...
    key: str  # name, shapes and settings: two calls of one key take the same time on one machine
    sizes: tuple[int, ...]  # what else its time depends on: of a convolution channels in and out, width, kernel, stride
    macs: int
    results: int  # elements written by an operator that has MACs, 0 for others: "activations" as fvcore counts them
    weights: int  # elements read of parameters and buffers
    read: int  # elements read of everything else
    written: int  # elements
    seconds: float | None = None

    @property
    def elements(self) -> int:
        """All that is read and written."""
        return self.weights + self.read + self.written


def trace(model: nn.Module, *inputs: Any, clock: str | None = None, **keywords: Any) -> list[Operator]:
    """The operators of one forward pass in eval mode without gradients; the model's mode is kept.

    Args:
        model: On any device.
        inputs: What it takes, on the same device.
        clock: To time each operator by, ``"wall"`` or ``"cpu"`` as in :func:`~zoo.analysis.benchmark.measure`; None not
            to. The first pass after building a model is slower than later ones.
        keywords: Passed on too.
    """
    training = model.training
    model.eval()
    recorder = _Recorder(model, None if clock is None else CLOCKS[clock])
    hooks = []
    device = next((x.device for x in _tensors(inputs)), torch.device("cpu"))
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(recorder.entering(path)))
        hooks.append(module.register_forward_hook(recorder.leaving, always_call=True))
    try:
        # Not inference_mode: there, linear and matmul arrive whole instead of as the operators they are made of.
        with torch.no_grad(), as_current(device):
            with recorder:
                model(*inputs, **keywords)
            return recorder.finish()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, clock: Callable[[], float] | None) -> None:
        super().__init__()
        self.stack = [""]
        self.operators: list[Operator] = []
        self.clock = clock
        self.events: list[tuple[Any, Any]] = []
        tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.owned = {_storage(tensor) for tensor in tensors}

    def entering(self, path: str) -> Callable[..., None]:
        return lambda module, arguments: self.stack.append(path)

    def leaving(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _FREE or func.namespace == "prim" or _is_view(func):
            return func(*args, **kwargs)
        out, seconds = self._run(func, args, kwargs)
        ins = list(_tensors((args, tuple(kwargs.values()))))
        outs = list(_tensors(out))
        macs = _macs(func, args, kwargs, out)
        weights = sum(x.numel() for x in ins if self._is_weight(x))
        written = sum(x.numel() for x in outs)
        self.operators.append(
            Operator(
                module=self.stack[-1],
                name=f"{func.namespace}::{name}",
                kind=_kind(func, name, macs, args),
                key=_key(name, args),
                sizes=_sizes(name, args, macs, written),
                macs=macs,
                results=_results(name, args, outs[0]) if macs else 0,
                weights=weights,
                read=sum(x.numel() for x in ins) - weights,
                written=written,
                seconds=seconds,
            )
        )
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, float | None]:
        if self.clock is None:
            return func(*args, **kwargs), None
        if any(x.is_cuda for x in _tensors(args)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = func(*args, **kwargs)
            end.record()
            self.events.append((len(self.operators), (start, end)))
            return out, None
        begin = self.clock()
        out = func(*args, **kwargs)
        return out, self.clock() - begin

    def _is_weight(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self.owned or tensor.is_mkldnn  # a weight that oneDNN packed

    def finish(self) -> list[Operator]:
        if self.events:
            torch.cuda.synchronize()
        for position, (start, end) in self.events:
            operator = self.operators[position]
            self.operators[position] = replace(operator, seconds=start.elapsed_time(end) / 1e3)
        return self.operators


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = query.shape
    return 2 * batch * heads * tokens * key.shape[-2] * (width + value.shape[-1])


def _results(name: str, args: Any, out: Tensor) -> int:
    """Elements that an operator writes; of attention in one kernel, also the weights that it would write in steps."""
    in_steps = math.prod(args[0].shape[:-1]) * args[1].shape[-2] if name.startswith("_scaled_dot_product") else 0
    return out.numel() + in_steps


def _packed_conv_flops(x: Any, weight: Any, *args: Any, out_val: Any = None, **__: Any) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape)


def _packed_linear_flops(x: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * out_val.numel() * x.shape[-1]


def _own_formula(name: str) -> Callable[..., int] | None:
    """For the kernels that run on CPUs, which torch's registry does not know."""
    if name == "_convolution_pointwise":
        return _packed_conv_flops
    if name == "_linear_pointwise":
        return _packed_linear_flops
    return _attention_flops if name.startswith("_scaled_dot_product") else None


def _macs(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    formula = _own_formula(func.overloadpacket.__name__) or flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0
    return formula(*args, **kwargs, out_val=out) // 2  # torch counts a multiply-accumulate as two FLOPs


def _kind(func: Any, name: str, macs: int, args: Any) -> str:
    if "convolution" in name:
        weight = args[1]
        if weight.shape[1] == 1 and weight.shape[0] > 1:
            return "depthwise conv"
        return "pointwise conv" if math.prod(weight.shape[2:]) == 1 else "conv"
    if name.startswith("_scaled_dot_product"):
        return "attention"
    if name in _KIND_OF:
        return _KIND_OF[name]
    return "scan" if macs else "elementwise" if func.namespace == "aten" else "other"


def _sizes(name: str, args: Any, macs: int, written: int) -> tuple[int, ...]:
    if "convolution" in name:
        x, weight = args[:2]
        stride = args[4] if name == "_convolution_pointwise" else args[3]
        return (x.shape[1], weight.shape[0], x.shape[-1], weight.shape[-1], int(stride[-1]))
    return (macs // max(1, written),) if macs else ()  # of a matrix product, the length of its sums


_SAME = {"_convolution_pointwise": "convolution", "_convolution": "convolution"}


def _key(name: str, args: Any) -> str:
    """Name, shapes and settings; the same for a convolution whose weight is packed and for one that is not."""
    shown = [_show(arg) for arg in args]
    if "convolution" in name:
        x, weight, bias = args[:3]
        packed = name == "_convolution_pointwise"
        padding, stride, dilation = (args[3], args[4], args[5]) if packed else (args[4], args[3], args[5])
        groups = args[6] if packed else args[8]
        settings = [list(map(int, values)) for values in (stride, padding, dilation)]
        shown = [list(x.shape), list(weight.shape), bias is not None, *settings, int(groups)]
    return f"{_SAME.get(name, name)}{tuple(shown)}"


def _show(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_mkldnn:
            return list(value.shape)
        return f"{list(value.shape)}{'' if value.is_contiguous() else list(value.stride())}"
    if isinstance(value, list | tuple):
        return [_show(item) for item in value]
    return value if isinstance(value, bool | int | str | None) else type(value).__name__


def by_module(operators: Iterable[Operator]) -> dict[str, list[Operator]]:
    """The operators of each module and of those inside it, by path; ``""`` has all."""
    groups: dict[str, list[Operator]] = defaultdict(list)
    for operator in operators:
        path = operator.module
        groups[path].append(operator)
        while path:
            path = path.rpartition(".")[0]
            groups[path].append(operator)
    return dict(groups)
