"""Convolutions whose weights oneDNN keeps in a layout of its own, for inference on CPUs."""

from typing import Any

import torch
from torch import Tensor, nn

# What a call costs in Python is worth it from about this many numbers on, which oneDNN would reorder every time.
MIN_NUMEL = 2**16

_reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight


class PackedConv2d(nn.Conv2d):
    """A convolution that packs its weight once, where PyTorch's own reorders it for oneDNN in every call.

    ``[B, Cin, H, W] -> [B, Cout, H', W']``, the same up to rounding. At batch 1 the reordering is a good part of the
    work of a network with wide layers. What is packed follows the weight when that changes, belongs to no state dict or
    copy, and takes as much memory again. Only plain eager inference in float32 uses it: elsewhere, in training,
    autocast, tracing, export, scripting and compiling, this is an ``nn.Conv2d``.
    """

    _packed: Any = None  # (weight, its version, shape of the input, packed weight, geometry)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "PackedConv2d":
        """The same convolution, packed, on the same parameters."""
        packed = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        packed.weight, packed.bias = conv.weight, conv.bias
        return packed.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # TorchScript does not compile this branch
            if _is_plain_inference(input, self.weight):
                return self._convolve_packed(input)
            return self._conv_forward(input, self.weight, self.bias)

    @torch.jit.unused
    def _convolve_packed(self, input: Tensor) -> Tensor:
        weight, shape, found = self.weight, input.shape, self._packed
        version = -1 if weight.is_inference() else weight._version
        if found is None or found[1:3] != (version, shape) or found[0].data_ptr() != weight.data_ptr():
            geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
            packed = _reorder(weight.detach().to_mkldnn(), *geometry, list(shape))
            # The weight is held, so that its address cannot become another's.
            found = self._packed = (weight.detach(), version, shape, packed, geometry)
        return torch.ops.mkldnn._convolution_pointwise.default(input, found[3], self.bias, *found[4], "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _is_plain_inference(x: Tensor, weight: Tensor) -> bool:
    if torch.is_grad_enabled() or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return False
    return bool(
        type(x) is Tensor  # neither a fake tensor nor one of FX
        and x.is_cpu
        and x.dtype is torch.float32
        and weight.is_cpu
        and weight.dtype is torch.float32
        and x.numel()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


def pack_convolutions(model: nn.Module) -> nn.Module:
    """Put, in place, a :class:`PackedConv2d` wherever there is a large ``nn.Conv2d`` that pads with zeros."""
    if not torch.backends.mkldnn.is_available():
        return model
    child: Any
    for name, child in list(model.named_children()):
        plain = type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str)
        if plain and child.weight.numel() >= MIN_NUMEL:
            setattr(model, name, PackedConv2d.of(child))
        else:
            pack_convolutions(child)
    return model
