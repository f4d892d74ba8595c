"""LeViT's attention bias: one learned number per head and offset ``(|dy|, |dx|)`` between two positions of a map."""

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


def offset_index(height: int, width: int, stride: int = 1, device: torch.device | None = None) -> Tensor:
    """Entry of the bias table for each pair of a query's position and a key's on a ``height`` x ``width`` map.

    Keys are at every position, queries at every ``stride``-th row and column: ``[Nq, N]`` int64. The query at the
    origin has the offsets in the table's own order: row 0 is 0, 1, 2, ...
    """
    keys = torch.arange(height * width, device=device)
    queries = keys.view(height, width)[::stride, ::stride].reshape(-1, 1)
    rows = (queries // width - keys // width).abs()
    columns = (queries % width - keys % width).abs()
    return rows * width + columns


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a table ``[heads, H * W]`` to another (height, width), bicubically as the authors' detectors do.

    Returns:
        ``[heads, H' * W']`` in the table's dtype; computed in float32 at least.
    """
    if old == new:
        return table
    image = table if table.dtype == torch.float64 else table.float()
    image = image.reshape(1, -1, old[0], old[1])
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    return image.reshape(-1, new[0] * new[1]).to(table.dtype)


class AttentionBias(nn.Module):
    """Mix-in for attention modules: holds ``attention_biases`` and adds nothing to the state dict but that.

    A table of another size is resampled on its way through ``load_state_dict``, so that weights trained at one
    resolution load at every other. :meth:`attention_bias` gathers in the forward pass, so that nothing can go stale;
    :meth:`freeze_attention_bias`, which ``fuse()`` calls, keeps the gathered bias as an ordinary buffer instead.
    """

    attention_biases: Tensor
    attention_bias_idxs: Tensor

    def init_attention_bias(self, num_heads: int, map_hw: tuple[int, int], *, stride: int = 1) -> None:
        """Create the table ``[num_heads, H * W]``, zero, and its index ``[Nq, N]`` (not saved).

        Args:
            num_heads: Rows of the table.
            map_hw: Height and width of the map that the keys are on.
            stride: Queries are at every ``stride``-th row and column of that map.
        """
        self.bias_hw = map_hw
        self.bias_stride = stride
        self.bias_frozen = False
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, math.prod(map_hw)))
        # The index is real even when the module is built on the meta device: it is not in any checkpoint.
        device = torch.device("cpu") if self.attention_biases.is_meta else None
        self.register_buffer("attention_bias_idxs", offset_index(*map_hw, stride, device), persistent=False)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

    def reset_attention_bias(self) -> None:
        """Set the table to zero and recompute the index in place."""
        nn.init.zeros_(self.attention_biases)
        with torch.no_grad():
            index = offset_index(*self.bias_hw, self.bias_stride, self.attention_bias_idxs.device)
            self.attention_bias_idxs.copy_(index)

    @torch.no_grad()
    def resize_attention_bias(self, map_hw: tuple[int, int]) -> None:
        """Change the map's height and width; the table is resampled."""
        if map_hw == self.bias_hw:
            return
        table = resize_bias_table(self.bias_table(), self.bias_hw, map_hw)
        self.attention_bias_idxs = offset_index(*map_hw, self.bias_stride, self.attention_bias_idxs.device)
        self.bias_hw = map_hw
        if self.bias_frozen:
            self.attention_biases = table[:, self.attention_bias_idxs]
        else:
            self.attention_biases = nn.Parameter(table, requires_grad=self.attention_biases.requires_grad)

    @torch.no_grad()
    def freeze_attention_bias(self) -> None:
        """Put the gathered bias ``[heads, Nq, N]`` in the table's place, a buffer saved and moved like any other."""
        if self.bias_frozen:
            return
        gathered = self.attention_bias()
        del self.attention_biases
        self.register_buffer("attention_biases", gathered)
        self.bias_frozen = True

    def bias_table(self) -> Tensor:
        """The table, ``[heads, H * W]``; a frozen one is found again in the biases of the query at the origin."""
        return self.attention_biases[:, 0] if self.bias_frozen else self.attention_biases

    def attention_bias(self) -> Tensor:
        """The bias of every pair of positions, ``[heads, Nq, N]``."""
        if self.bias_frozen:
            return self.attention_biases
        return self.attention_biases[:, self.attention_bias_idxs]

    def attention_bias_at(self, height: int, width: int) -> Tensor:
        """The same on a map of any size: the table is resampled when it is not the map's."""
        if height == self.bias_hw[0] and width == self.bias_hw[1]:
            return self.attention_bias()
        table = resize_bias_table(self.bias_table(), self.bias_hw, (height, width))
        return table[:, offset_index(height, width, self.bias_stride, table.device)]


def _adapt_state_dict(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resample a table that belongs to a square map of another size; drop an index, which some files hold."""
    state_dict.pop(prefix + "attention_bias_idxs", None)
    key = prefix + "attention_biases"
    table = state_dict.get(key)
    if table is None or module.bias_frozen or table.ndim != 2:
        return
    side, own = math.isqrt(table.shape[1]), module.attention_biases
    if table.shape[1] != own.shape[1] and side**2 == table.shape[1] and table.shape[0] == own.shape[0]:
        _logger.info("%s resampled from %d to %d entries", key, table.shape[1], own.shape[1])
        state_dict[key] = resize_bias_table(table, (side, side), module.bias_hw)
