"""LeViT's attention bias: one learned number per head and per offset ``(|dy|, |dx|)`` between two positions of a map."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


def offset_index(side: int, device: torch.device | None = None) -> Tensor:
    """Entry of the bias table for each pair of positions on a ``side`` x ``side`` map, ``[N, N]`` int64."""
    rows, columns = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return (rows[:, None] - rows).abs() * side + (columns[:, None] - columns).abs()


def resize_bias_table(table: Tensor, side: int) -> Tensor:
    """Resample a bias table ``[heads, n * n]`` to ``[heads, side * side]`` bicubically, as the authors' detectors do."""
    heads, entries = table.shape
    old = round(entries**0.5)
    if old == side:
        return table
    image = table.float().reshape(1, heads, old, old)
    image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    return image.reshape(heads, side * side).to(table.dtype)


class AttentionBias(nn.Module):
    """Mix-in for attention modules: holds ``attention_biases`` and adds nothing to the state dict but that.

    A table of another size is resampled on its way through ``load_state_dict``, so that weights trained at one
    resolution load at every other. :meth:`attention_bias` gathers in the forward pass, so that nothing can go stale;
    :meth:`freeze_attention_bias`, which ``fuse()`` calls, keeps the gathered bias as an ordinary buffer instead.
    """

    attention_biases: Tensor
    attention_bias_idxs: Tensor

    def init_attention_bias(self, num_heads: int, side: int) -> None:
        """Create the table ``[num_heads, side * side]``, zero, and its index ``[N, N]`` (not saved)."""
        self.bias_side = side
        self.bias_frozen = False
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, side * side))
        # The index is real even when the module is built on the meta device: it is not in any checkpoint.
        device = torch.device("cpu") if self.attention_biases.is_meta else None
        self.register_buffer("attention_bias_idxs", offset_index(side, device), persistent=False)
        self.register_load_state_dict_pre_hook(_resample_table)

    def reset_attention_bias(self) -> None:
        """Set the table to zero and recompute the index in place."""
        nn.init.zeros_(self.attention_biases)
        with torch.no_grad():
            self.attention_bias_idxs.copy_(offset_index(self.bias_side, self.attention_bias_idxs.device))

    def resize_attention_bias(self, side: int) -> None:
        """Change the map side; the table is resampled."""
        if side == self.bias_side:
            return
        with torch.no_grad():
            table = resize_bias_table(self.attention_biases, side)
        self.attention_biases = nn.Parameter(table, requires_grad=self.attention_biases.requires_grad)
        self.attention_bias_idxs = offset_index(side, self.attention_bias_idxs.device)
        self.bias_side = side

    def freeze_attention_bias(self) -> None:
        """Replace the table by the gathered bias ``[heads, N, N]``, a buffer that is saved and moved like any other."""
        with torch.no_grad():
            gathered = self.attention_biases[:, self.attention_bias_idxs]
        del self.attention_biases
        self.register_buffer("attention_biases", gathered)
        self.bias_frozen = True

    def attention_bias(self) -> Tensor:
        """The bias of every pair of positions, ``[heads, N, N]``."""
        if self.bias_frozen:
            return self.attention_biases
        return self.attention_biases[:, self.attention_bias_idxs]


def _resample_table(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    key = prefix + "attention_biases"
    table = state_dict.get(key)
    if table is None or module.bias_frozen or table.ndim != 2:
        return
    entries = module.bias_side**2
    is_square = round(table.shape[1] ** 0.5) ** 2 == table.shape[1]
    if table.shape[1] != entries and is_square and table.shape[0] == module.attention_biases.shape[0]:
        _logger.info("%s resampled from %d to %d entries", key, table.shape[1], entries)
        state_dict[key] = resize_bias_table(table, module.bias_side)
