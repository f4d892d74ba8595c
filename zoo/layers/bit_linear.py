"""Linear layers on int8 activations and ternary weights."""

from typing import Any

from torch import Tensor, nn

from zoo.ops.bit_linear import bit_linear


class BitLinear(nn.Linear):
    """``[..., Cin] -> [..., Cout]``: RMSNorm, int8 activations, ternary weights; see :func:`zoo.ops.bit_linear`.

    There is no bias. ``weight`` is in full precision, for training; ``norm.weight`` is the norm's.
    """

    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-6, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **factory)
        self.norm = nn.RMSNorm(in_features, eps=eps, **factory)

    def forward(self, input: Tensor) -> Tensor:
        return bit_linear(input, self.weight, self.norm.weight, eps=self.norm.eps or 0.0)
