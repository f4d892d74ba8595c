"""Linear layers."""

from torch import nn


class TruncNormalLinear(nn.Linear):
    """A linear layer that starts as vision transformers' do: truncated normal of std 0.02, zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
