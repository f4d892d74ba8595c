"""Linear layers on int8 activations and ternary weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.layers.embedding import Int8Embedding
from zoo.ops.bit_linear import bit_linear, pack_weight, packed_bit_linear


class BitLinear(nn.Linear):
    """``[..., Cin] -> [..., Cout]``: RMSNorm, int8 activations, ternary weights; see :func:`zoo.ops.bit_linear`.

    There is no bias. ``weight`` is in full precision, for training; ``norm.weight`` is the norm's.
    """

    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-6, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **factory)
        self.norm = nn.RMSNorm(in_features, eps=eps, **factory)

    def forward(self, input: Tensor) -> Tensor:
        return bit_linear(input, self.weight, self.norm.weight, eps=self.norm.eps or 0.0)


class PackedBitLinear(nn.Module):
    """A :class:`BitLinear` for inference, whose weights take two bits each and are never expanded to a whole matrix.

    Buffers: ``packed``, ``[R, Cin]`` uint8, where R is Cout / 4, rounded up, and ``scale``, ``[]``, always float32.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Every code is 1, which stands for 0.
        self.register_buffer("packed", torch.full((-(-out_features // 4), in_features), 0b01010101, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.norm = nn.RMSNorm(in_features, eps=eps)

    @classmethod
    def of(cls, layer: BitLinear) -> "PackedBitLinear":
        """The same layer, packed.

        Raises:
            WeightsError: If there is NaN or infinity in its weights.
        """
        with torch.device("meta"):
            packed = cls(layer.in_features, layer.out_features, eps=layer.norm.eps or 0.0)
        if not layer.norm.weight.isfinite().all():
            raise WeightsError("The norm's weight is not finite: there is NaN or infinity in it.")
        packed.packed, packed.scale = pack_weight(layer.weight)
        packed.norm = layer.norm
        return packed.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        buffers, norm = self._buffers, self.norm  # looked up once: attributes of modules take their time
        packed, scale = buffers["packed"], buffers["scale"]
        assert packed is not None
        assert scale is not None
        return packed_bit_linear(input, packed, scale, norm.weight, out_features=self.out_features, eps=norm.eps or 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedBitLinear":
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # a model in half precision keeps its ternary weights exact
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def has_packed_layers(model: nn.Module) -> bool:
    """Whether there is a :class:`PackedBitLinear` in it."""
    return any(isinstance(module, PackedBitLinear) for module in model.modules())


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def replace_bit_linears(model: nn.Module, replacement: Callable[[BitLinear], nn.Module]) -> nn.Module:
    """Put, in place, what ``replacement`` gives wherever there is a :class:`BitLinear`; all or, if it raises, none.

    Raises:
        ConfigError: If there is no BitLinear in it.
        WeightsError: As ``replacement`` raised it, with the layer's name.
    """
    found = {name: layer for name, layer in model.named_modules() if type(layer) is BitLinear}
    if not found:
        raise ConfigError(f"{type(model).__name__} has no BitLinear to pack; expected a model such as matmulfree_370m.")
    replaced = {}
    for name, layer in found.items():
        try:
            replaced[name] = replacement(layer)
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from error
    for name, new in replaced.items():
        _put(model, name, new)
    return model


def replace_embeddings(model: nn.Module, replacement: Callable[[nn.Embedding], nn.Module]) -> nn.Module:
    """Put, in place, what ``replacement`` gives wherever there is an embedding."""
    for name, layer in [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Embedding]:
        _put(model, name, replacement(layer))
    return model


def pack_bit_linears(model: nn.Module, *, int8_embeddings: bool = False) -> nn.Module:
    """Put, in place, a :class:`PackedBitLinear` wherever there is a :class:`BitLinear`; for inference. Gives the model.

    Args:
        model: With ternary layers; answers as before.
        int8_embeddings: Round embeddings to 8 bits too (:class:`~zoo.layers.embedding.Int8Embedding`), which changes
            answers a little. They are most of what a packed model takes.

    Raises:
        ConfigError: If there is no BitLinear in it.
        WeightsError: If there is NaN or infinity in the weights of one; nothing is replaced then.
    """
    replace_bit_linears(model, PackedBitLinear.of)
    return replace_embeddings(model, Int8Embedding.of) if int8_embeddings else model
