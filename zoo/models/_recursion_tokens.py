"""Which tokens of a pass a recursion runs, and how they attend: to one another, and to cached ones before them.

In this file N is the number of selected tokens, Hkv of key and value heads, L of cached tokens.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models._recursion_cache import RecursionCache
from zoo.ops.attend_rows import attend_rows

if TYPE_CHECKING:
    from zoo.families.mixture_of_recursions import MixtureOfRecursionsConfig


class Rope(nn.Module):
    """Cosines and sines of rotary position embedding, ``[B, T]`` -> two of ``[B, T, K]``."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=precise)
        angles = positions[..., None] * self.theta ** (-steps / self.head_dim)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Chunk:
    """The tokens of one forward pass: ``[B, T]`` of them, of which some may be padding.

    Attributes:
        slots: ``[B, T]``, where each token stands in its row, cached tokens and padding included.
        starts: ``[B, T]``, the slot at which each token's document begins, as its position says. None: all at 0.
        real: ``[B, T]`` bool, False for padding; None for no padding.
        cos, sin: ``[B or 1, T, 1, K]``.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        positions: Tensor | None,
        mask: Tensor | None,
        past: int,
        cache: RecursionCache | None,
        rope: Rope,
        like: Tensor,
    ) -> None:
        self.batch_size, self.length = shape
        self.past, self.cache = past, cache
        device = like.device
        slots = torch.arange(past, past + self.length, device=device).expand(shape)
        self.slots = slots
        self.real: Tensor | None = None if mask is None or bool(mask.all()) else mask
        self.starts: Tensor | None = None
        before = cache.depths >= 0 if cache is not None and cache.depths is not None else None
        if before is not None and bool(before.all()):
            before = None  # all that was seen is real
        if positions is not None:
            positions = positions.expand(len(positions), self.length)
            real = self.real
            if before is not None or (past and real is not None):
                now = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
                was = torch.ones(shape[0], past, dtype=torch.bool, device=device) if before is None else before
                real = torch.cat([was, now], 1)
            first = 0 if real is None else real.int().argmax(1, keepdim=True)
            starts = (slots - positions).clamp(min=0)
            begun = starts > first
            if self.real is not None:
                begun &= self.real
            self.starts = starts if bool(begun.any()) else None
        elif self.real is None and before is None:
            positions = slots[:1]
        else:
            seen = past if before is None else before.sum(1, keepdim=True)
            now = torch.ones_like(slots) if self.real is None else self.real.long()
            positions = (seen + now.cumsum(1) - 1).clamp(min=0)
        self.cos, self.sin = (each[:, :, None] for each in rope(positions, like.dtype))


class Tokens:
    """Some tokens of a chunk: gathers them, lets them attend to one another, and adds what comes of it.

    Args:
        chunk: The pass.
        group: Of the cache.
        index: ``[B, N/B]``, the same number of every row; None for all tokens.
        flat: (rows, columns), ``[N]`` each, where rows differ in their numbers. Both None: every token of the chunk.
        everything: The chunk's every token, whose keys these look at under ``kv_mode`` "share" and "update", from the
            second recursion on; None: these look at their own.
    """

    def __init__(
        self,
        chunk: Chunk,
        config: "MixtureOfRecursionsConfig",
        group: int,
        index: Tensor | None = None,
        flat: tuple[Tensor, Tensor] | None = None,
        everything: "Tokens | None" = None,
    ) -> None:
        self.chunk, self.config, self.group = chunk, config, group
        self.index, self.flat = index, flat
        self.cos, self.sin = (self.gather(each.expand(chunk.batch_size, -1, -1, -1)) for each in (chunk.cos, chunk.sin))
        self.everything = everything
        self._placed: Tensor | None = None  # [N], columns in the cache's stores
        self._whole = False  # the stores were empty, and these are all there is

    @cached_property
    def rows(self) -> Tensor:
        """``[N]``, the row of each token."""
        if self.flat is not None:
            return self.flat[0]
        return torch.arange(self.chunk.batch_size, device=self.slots.device).repeat_interleave(self.slots.shape[1])

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each token."""
        return self.gather(self.chunk.slots)

    @cached_property
    def ranks(self) -> Tensor:
        """``[N]``, how many tokens of its row come before each."""
        if self.flat is None:
            return torch.arange(self.slots.shape[1], device=self.slots.device).repeat(self.chunk.batch_size)
        starts = torch.cumsum(self.counts, 0) - self.counts
        return torch.arange(len(self.rows), device=self.rows.device) - starts[self.rows]

    @cached_property
    def counts(self) -> Tensor:
        """``[B]``, how many tokens each row has."""
        if self.flat is None:
            return self.slots.new_full((self.chunk.batch_size,), self.slots.shape[1])
        return torch.bincount(self.flat[0], minlength=self.chunk.batch_size)

    def gather(self, x: Tensor) -> Tensor:
        """These tokens of ``[B, T, ...]``: ``[B, N/B, ...]``, or ``[N, ...]`` where rows differ."""
        if self.flat is not None:
            return x[self.flat]
        if self.index is None:
            return x
        index = self.index.reshape(*self.index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """``x`` ``[B, T, D]`` with these tokens' values in their places."""
        if self.flat is not None:
            return x.index_put(self.flat, values)
        if self.index is None:
            return values
        return x.scatter(1, self.index[..., None].expand_as(values), values)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """``x`` ``[B, T, D]`` with the update added at these tokens."""
        if self.flat is not None:
            return x.index_put(self.flat, update, accumulate=True)
        if self.index is None:
            return x + update
        return x.scatter_add(1, self.index[..., None].expand_as(update), update)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of ``[..., H, K]``, halves rotated."""
        near, far = x.chunk(2, -1)
        return x * self.cos + torch.cat((-far, near), -1) * self.sin

    @property
    def width(self) -> int:
        """Tokens of the fullest row."""
        return int(self.counts.max()) if self.flat is not None else self.slots.shape[1]

    @property
    def writes(self) -> bool:
        """Whether these make keys and values of their own."""
        return self.everything is None or self.config.kv_mode == "update"

    @property
    def _looks_back(self) -> bool:
        """Whether there are more keys than these tokens' own."""
        return self.chunk.past > 0 or self.everything is not None

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attention of these tokens among themselves and the cached ones before them.

        Args:
            layer: Which of the unrolled layers this is.
            q: ``[..., H, K]``, rotated.
            k, v: ``[..., Hkv, K]``, k rotated; None unless these tokens write.

        Returns:
            ``[..., H, K]``.
        """
        cache, config = self.chunk.cache, self.config
        store = config.store_of(layer)
        if cache is not None:
            if k is not None and v is not None:
                self._remember(cache, store, k, v)
            keys, values = cache.keys[store], cache.values[store]
            assert keys is not None
            assert values is not None
            if self.chunk.length == 1 and self.chunk.starts is None:
                return attend_rows(q.flatten(0, -3), keys, values, self.rows, self._reach).view_as(q)
        if cache is not None and self._looks_back:
            length = cache.longest(self.group)
            keys, values = keys[:, :, :length], values[:, :, :length]  # type: ignore[index]
        else:
            assert k is not None
            assert v is not None
            keys, values = self._padded(k).transpose(1, 2), self._padded(v).transpose(1, 2)
        mask = self._mask
        grouped = keys.shape[1] != q.shape[-2]
        out = F.scaled_dot_product_attention(
            self._padded(q).transpose(1, 2), keys, values, mask, is_causal=mask is None, enable_gqa=grouped
        )
        out = out.transpose(1, 2)
        return out if self.flat is None else out[self.rows, self.ranks]

    @cached_property
    def _reach(self) -> Tensor:
        """``[N]``, how many tokens the row of each holds: these themselves are counted by now."""
        assert self.chunk.cache is not None
        counts = self.chunk.cache.counts[self.group]
        assert counts is not None
        return counts[self.rows]

    def _padded(self, x: Tensor) -> Tensor:
        """``[B, width, ...]``, with zeros where a row has fewer."""
        if self.flat is None:
            return x
        padded = x.new_zeros(self.chunk.batch_size, self.width, *x.shape[1:])
        return padded.index_put((self.rows, self.ranks), x)

    def _remember(self, cache: RecursionCache, store: int, k: Tensor, v: Tensor) -> None:
        if self.everything is not None:  # "update": the keys of the recursion before, and these in their places
            every = self.everything
            assert every._placed is not None
            every._keep_keys(cache, store)
            if self._placed is None:
                grid = torch.zeros_like(self.chunk.slots)
                grid[every.flat or (every.rows, self.chunk.slots.flatten() - self.chunk.past)] = every._placed
                self._placed = self.gather(grid).flatten()
            cache.put(store, self.rows, self._placed, k.flatten(0, -3), v.flatten(0, -3))
            return
        if self._placed is None:
            self._whole = cache.counts[self.group] is None and self.flat is None
            ranks = None if self.chunk.length == 1 else self.ranks
            self._placed = cache.place(self.group, self.rows, self.slots.flatten(), self.chunk.batch_size, ranks)
        if self._whole:
            cache.put_whole(store, k.transpose(1, 2), v.transpose(1, 2))
        else:
            cache.put(store, self.rows, self._placed, k.flatten(0, -3), v.flatten(0, -3))

    def keep_keys(self, recursions: Iterable[int]) -> None:
        """Under ``kv_mode`` "update", give recursions that no token takes the keys of the ones before them."""
        config, cache = self.config, self.chunk.cache
        if config.kv_mode != "update" or cache is None or not self.rows.numel():
            return
        for recursion in recursions:
            first = config.own_layers // 2 + recursion * config.base_depth
            for store in range(first, first + config.base_depth):
                self._keep_keys(cache, store)

    def _keep_keys(self, cache: RecursionCache, store: int) -> None:
        older = store - self.config.base_depth
        keys, values = cache.keys[older], cache.values[older]
        assert self._placed is not None
        assert keys is not None
        assert values is not None
        rows, columns = self.rows, self._placed
        cache.put(store, rows, columns, keys[rows, :, columns], values[rows, :, columns])

    @cached_property
    def _mask(self) -> Tensor | None:
        """``[B, 1, width, L]`` bool, True where a token may look; None for plain causal attention."""
        chunk = self.chunk
        if self.flat is None and chunk.starts is None and not self._looks_back:
            return None
        slots = self._padded(self.slots) if self.flat is not None else self.slots
        if self._looks_back:
            assert chunk.cache is not None
            keys = chunk.cache.key_slots(self.group)
        else:
            columns = torch.arange(slots.shape[1], device=slots.device)
            keys = slots.masked_fill(columns >= self.counts[:, None], -1)
        mask = (keys[:, None] <= slots[..., None]) & (keys[:, None] >= 0)
        if chunk.starts is not None:
            starts = self.gather(chunk.starts)
            starts = self._padded(starts) if self.flat is not None else starts
            mask &= keys[:, None] >= starts[..., None]
        if self.flat is not None:  # a row's missing tokens look at everything, so that no softmax is of nothing
            columns = torch.arange(slots.shape[1], device=slots.device)
            mask |= (columns >= self.counts[:, None])[..., None]
        return mask[:, None]
