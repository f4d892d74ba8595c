"""Convolutions and linear layers for inference on CPUs: weights as oneDNN wants them, activations in the same operator.

oneDNN works on weights in a layout of its own. PyTorch's layers bring them into it in every call, which at batch 1 is a
good part of the work; what is here does so once. Only plain eager inference in float32 on a CPU takes this way:
elsewhere, in training, autocast, tracing, export, scripting and compiling, the layers are PyTorch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from zoo.layers.linear import PointLinear

# Calling oneDNN costs 10 to 50 microseconds more than calling BLAS, and gives more speed. That pays from about this
# many multiply-accumulates on; from fewer for a linear layer with an activation, which then takes no pass of its own;
# and from this many numbers in the weight of a linear layer, however few the rows. With AVX2 alone, and on Intel's
# processors with AMX, for which its MKL is written, oneDNN is no faster than BLAS at matrix products that leave BLAS
# little to rearrange, and pays later; with AMX never for few rows, where packing only rearranges the weight for BLAS.
_MIN_MACS = 2e6
_HAS_AMX = torch.cpu._is_amx_tile_supported()
_MIN_LINEAR_MACS = 5e7 if _HAS_AMX else 2.5e7 if torch.backends.cpu.get_cpu_capability() == "AVX2" else _MIN_MACS
_MIN_ACTIVATED_MACS = 1.25e7 if _HAS_AMX else _MIN_LINEAR_MACS / 2
_MIN_LINEAR_NUMEL = 2**18

_ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu", nn.Hardswish: "hardswish", nn.SiLU: "swish"}  # oneDNN's names

_reorder_conv: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)  # in no build without oneDNN
_reorder_linear: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_onednn_conv: Any = getattr(getattr(torch.ops.mkldnn, "_convolution_pointwise", None), "default", None)
_onednn_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def activation_name(module: nn.Module) -> str:
    """What oneDNN calls an activation; ``""`` for one that it does not have."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return ""
    return _ACTIVATIONS.get(type(module), "")


def _activate(x: Tensor, act: str) -> Tensor:
    """An activation by oneDNN's name, not in place, so that it can be trained through."""
    if act == "relu":
        return F.relu(x)
    if act == "gelu":
        return F.gelu(x)
    if act == "hardswish":
        return F.hardswish(x)
    if act == "swish":
        return F.silu(x)
    return x


_ACTIVATE_IN_PLACE: dict[str, Any] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "hardswish": torch.ops.aten.hardswish_.default,
    "swish": torch.ops.aten.silu_.default,
}


class PackedConv2d(nn.Conv2d):
    """A convolution and an activation, ``[B, Cin, H, W] -> [B, Cout, H', W']``, the same up to rounding.

    What is packed follows the weight when that changes, belongs to no state dict or copy, and takes as much memory
    again. Small 1x1 convolutions on channels-last maps run as matrix products, where nothing is packed.

    Attributes:
        act: ``"relu"``, ``"gelu"``, ``"hardswish"``, ``"swish"``, or ``"none"``.
    """

    act: str = "none"
    # (address of the weight, its version, shape of the input, threads, how to run it, the packed weight, the weight)
    _packed: Any = None

    @classmethod
    def of(cls, conv: Any, act: nn.Module | None = None) -> "PackedConv2d":
        """The same convolution, on the same parameters, and the activation after it."""
        packed = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        packed.weight, packed.bias = conv.weight, conv.bias
        packed.act = "none" if act is None else activation_name(act)
        assert packed.act, f"oneDNN has no {act}"
        return packed.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._convolve(input)
        else:  # TorchScript does not compile this branch
            if is_plain_inference(input, _own_weight(self)):
                return self._run(input)
            return self._convolve(input)

    def _convolve(self, input: Tensor) -> Tensor:
        return _activate(self._conv_forward(input, self.weight, self.bias), self.act)

    @torch.jit.unused
    def run(self, input: Tensor) -> Tensor:
        """A forward pass in which :func:`is_plain_inference` is not asked again; hooks are called."""
        return self(input) if is_hooked(self) else self._run(input)

    @torch.jit.unused
    def _run(self, input: Tensor) -> Tensor:
        weight, found = self._parameters["weight"], self._packed
        assert weight is not None
        key = _key(weight, input.shape)
        if found is None or found[:4] != key:
            held = weight.detach()
            found = self._packed = (*key, *self._pack(held, input), held)
        bias = self._parameters["bias"]
        if found[4] is None:
            y = F.linear(input.permute(0, 2, 3, 1), found[5], bias).permute(0, 3, 1, 2)
            return y if self.act == "none" else _ACTIVATE_IN_PLACE[self.act](y)
        y = _onednn_conv(input, found[5], bias, *found[4])
        return F.silu(y, inplace=True) if self.act == "swish" else y

    def _pack(self, weight: Tensor, input: Tensor) -> tuple[Any, Tensor]:
        """Arguments of oneDNN's convolution, None for a matrix product, and the weight as either needs it."""
        padding, stride, dilation, groups = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if (
            self.kernel_size == self.stride == (1, 1)
            and padding == [0, 0]
            and groups == 1
            and input.ndim == 4
            and input.numel() * self.out_channels < _MIN_MACS
            and input.is_contiguous(memory_format=torch.channels_last)
        ):
            return None, weight.flatten(1)
        packed = _reorder_conv(weight.to_mkldnn(), padding, stride, dilation, groups, list(input.shape))
        act = "none" if self.act == "swish" else self.act  # PyTorch's is faster than oneDNN's
        return (padding, stride, dilation, groups, act, (), "none" if act == "gelu" else ""), packed

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class PackedLinear(nn.Linear):
    """A linear layer and an activation, ``[..., Cin] -> [..., Cout]``; see :class:`PackedConv2d`.

    Small products are left to BLAS, on a copy of the weight by columns, which it takes without rearranging it.
    """

    act: str = "none"
    # (address of the weight, its version, rows of the input, threads, whether by oneDNN, copy, the weight)
    _packed: Any = None

    @classmethod
    def of(cls, linear: nn.Linear, act: nn.Module | None = None) -> "PackedLinear":
        """The same layer, on the same parameters, and the activation after it."""
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        packed.weight, packed.bias = linear.weight, linear.bias
        packed.act = "none" if act is None else activation_name(act)
        assert packed.act, f"oneDNN has no {act}"
        return packed.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return _activate(F.linear(input, self.weight, self.bias), self.act)
        else:  # TorchScript does not compile this branch
            if is_plain_inference(input, _own_weight(self)):
                return self._run(input)
            return _activate(F.linear(input, self.weight, self.bias), self.act)

    @torch.jit.unused
    def run(self, input: Tensor) -> Tensor:
        """A forward pass in which :func:`is_plain_inference` is not asked again; hooks are called.

        Who calls it may write over the result: no hook holds that tensor.
        """
        return self(input).clone() if is_hooked(self) else self._run(input)

    @torch.jit.unused
    def add_to(self, total: Tensor, input: Tensor) -> Tensor:
        """``total += layer(input)``, ``[N, Cout]`` and ``[N, Cin]``, where :meth:`run` may be called; gives ``total``.

        BLAS adds to what it finds. A linear layer by itself has to fill its output with the bias first.
        """
        if is_hooked(self):
            return total.add_(self(input))
        by_onednn, packed = self._pack(len(input))
        if by_onednn or self.act != "none":
            return total.add_(self._run(input))
        total.addmm_(input, packed.t())
        bias = self._parameters["bias"]
        return total if bias is None else total.add_(bias)

    @torch.jit.unused
    def _run(self, input: Tensor) -> Tensor:
        by_onednn, packed = self._pack(input.numel() // input.shape[-1])
        bias = self._parameters["bias"]
        if by_onednn:
            algorithm = "none" if self.act == "gelu" else ""
            return _onednn_linear(input, packed, bias, self.act, (), algorithm)
        y = F.linear(input, packed, bias)
        return y if self.act == "none" else _ACTIVATE_IN_PLACE[self.act](y)

    def _pack(self, rows: int) -> tuple[bool, Tensor]:
        """Whether oneDNN multiplies so many rows, rather than BLAS, and the weight as it wants it; kept."""
        weight, found = self._parameters["weight"], self._packed
        assert weight is not None
        key = _key(weight, rows)
        if found is None or found[:4] != key:
            held = weight.detach()
            pays = rows * held.numel() >= (_MIN_LINEAR_MACS if self.act == "none" else _MIN_ACTIVATED_MACS)
            pays = pays or (not _HAS_AMX and held.numel() >= _MIN_LINEAR_NUMEL)
            copy = _reorder_linear(held, rows) if pays else held.t().contiguous().t()
            found = self._packed = (*key, pays, copy, held)
        return found[4], found[5]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _own_weight(layer: nn.Module) -> Tensor | None:
    """The weight; None where it or the bias is computed from others, as pruning and parametrisations do."""
    return layer._parameters.get("weight") if "bias" in layer._parameters else None


def _key(weight: Tensor, size: Any) -> tuple[Any, ...]:
    """What a packed weight is good for; who keeps it holds the weight, so that its address cannot become another's.

    oneDNN chooses the layout by the number of threads too, and takes several times as long with another's.
    """
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, size, torch.get_num_threads()


def is_plain_inference(x: Tensor, weight: Tensor | None) -> bool:
    """Whether this is eager inference in float32 on a CPU, under no transformation that would see other operators."""
    if torch.is_grad_enabled() or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return False
    return bool(
        type(x) is Tensor  # neither a fake tensor nor one of FX
        and weight is not None
        and x.is_cpu
        and x.dtype is torch.float32
        and weight.is_cpu
        and weight.dtype is torch.float32
        and x.numel()
        and not torch.is_autocast_enabled("cpu")
        and not _has_any_global_hook()
        and torch._C._get_mkldnn_enabled()
        and _reorder_conv is not None
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class's forward pass, global hooks aside."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or "forward" in module.__dict__  # as some put another in its place
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class's forward pass."""
    return has_hooks(module) or _has_any_global_hook()


def fuse_activation(module: nn.Module, act: str, *layers: str) -> None:
    """Let convolutions or linear layers, by attribute, take over the activation ``module.<act>`` after each, in place.

    An identity takes the activation's place.
    """
    activation = getattr(module, act)
    if isinstance(activation, nn.Identity):  # fused before
        return
    for name in layers:
        layer = getattr(module, name)
        packed: Any = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
        setattr(module, name, packed.of(layer, activation))
    setattr(module, act, nn.Identity())


def pack(model: nn.Module) -> nn.Module:
    """Put, in place, a packed layer wherever there is a convolution that pads with zeros, or a linear layer.

    In an ``nn.Sequential``, one takes over the activation after it, and leaves an identity in its place.
    """
    # named_children() leaves out what comes a second time, as an activation does.
    children: list[Any] = [(name, child) for name, child in model._modules.items() if child is not None]
    followers: list[Any] = [child for _, child in children[1:]] if isinstance(model, nn.Sequential) else []
    for i, (name, child) in enumerate(children):
        packed = _packed_class(child)
        if packed is None:
            pack(child)
            continue
        follower = followers[i] if i < len(followers) else None
        act = follower if follower is not None and activation_name(follower) else None
        setattr(model, name, packed.of(child, act))
        if act is not None:
            setattr(model, children[i + 1][0], nn.Identity())
    return model


def _packed_class(layer: Any) -> Any:
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return PackedConv2d
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        pays = not isinstance(layer, PointLinear) or layer.weight.numel() >= _MIN_LINEAR_NUMEL
        return PackedLinear if pays else None
    return None
