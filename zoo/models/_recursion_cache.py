"""Keys and values of the tokens that a recursive language model has seen, each layer holding only the tokens it ran.

Pure storage, no layer of a network. :mod:`zoo.models._causal_lm` makes it a cache of ``generate``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.config import TextConfig
from zoo.models._causal_lm import TrunkCache

_GROWTH = 64  # tokens that a full store is enlarged by, at least


class RecursionCache(TrunkCache):
    """Ragged stores of keys and values, one for each layer that keeps any.

    Layers that always run the same tokens form a group, which knows once for all of them where the tokens lie. Tokens
    of a row stand side by side in the order of their slots; padding is never stored.

    Args:
        config: Of the model that it belongs to.
        groups: For each store, the group it belongs to.
        num_groups: How many groups there are; group 0 holds every token.

    Attributes:
        length: Slots seen: tokens, and padding between them. Whoever calls the trunk counts them.
        keys, values: Per store ``[B, Hkv, capacity, K]``, None before the first token. What lies beyond a row's count
            is not initialised to anything but finite numbers.
        counts: Per group ``[B]``, tokens stored of each row.
        slots: Per group ``[B, capacity]`` int64: which slot each stored token had, ascending.
        depths: ``[B, length]`` int8: recursions that each slot's token took, -1 for padding.
    """

    def __init__(self, config: TextConfig, groups: Sequence[int], num_groups: int) -> None:
        super().__init__(config)
        self.groups = tuple(groups)
        self.num_groups = num_groups
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.keys: list[Tensor | None] = [None] * len(self.groups)
        self.values: list[Tensor | None] = [None] * len(self.groups)
        self.counts: list[Tensor | None] = [None] * self.num_groups
        self.slots: list[Tensor | None] = [None] * self.num_groups
        self.depths: Tensor | None = None

    @property
    def rows(self) -> int:
        """Size of the batch; 0 before anything was read."""
        return 0 if self.depths is None else len(self.depths)

    def tokens_stored(self) -> list[int]:
        """For each store, how many tokens it holds, over all rows."""
        totals = [0 if counts is None else int(counts.sum()) for counts in self.counts]
        return [totals[group] for group in self.groups]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are stored: ``2 Hkv K itemsize`` for each token and store."""
        total = 0
        for tokens, keys in zip(self.tokens_stored(), self.keys, strict=True):
            if keys is not None:
                total += 2 * tokens * keys.shape[1] * keys.shape[3] * keys.element_size()
        return total

    @property
    def nbytes_allocated(self) -> int:
        """Bytes that are held for keys and values: rows are as long as the longest, and grow in steps."""
        return sum(2 * keys.numel() * keys.element_size() for keys in self.keys if keys is not None)

    def extend(self, depths: Tensor) -> None:
        """Record the slots of one more pass.

        Args:
            depths: ``[B, T]``, recursions that each token takes; -1 for padding.
        """
        depths = depths.to(torch.int8)
        self.depths = depths if self.depths is None else torch.cat([self.depths, depths], 1)

    def place(self, group: int, rows: Tensor, slots: Tensor, batch_size: int, ranks: Tensor | None = None) -> Tensor:
        """Say where tokens go, before their keys and values come with :meth:`put`.

        Args:
            group: Whose tokens these are.
            rows: ``[N]``, the row of each token; ascending, or each at most once.
            slots: ``[N]``, the slot of each, ascending in each row.
            batch_size: Rows of the cache, where it is still empty.
            ranks: ``[N]``, how many tokens of its row come before each among these; None for none.

        Returns:
            ``[N]``, the column of each token in the group's stores.
        """
        counts, known = self.counts[group], self.slots[group]
        if counts is None or known is None:
            counts = torch.zeros(batch_size, dtype=torch.int64, device=rows.device)
            known = torch.zeros(batch_size, 0, dtype=torch.int64, device=rows.device)
        columns = counts[rows] if ranks is None else counts[rows] + ranks
        counts = counts.clone().index_add_(0, rows, torch.ones_like(rows))
        known = _grown(known, int(counts.max()) if len(rows) else 0, dim=1)
        known[rows, columns] = slots
        self.counts[group], self.slots[group] = counts, known
        return columns

    def put(self, store: int, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[N, Hkv, K]`` where :meth:`place` said."""
        group = self.groups[store]
        counts, slots = self.counts[group], self.slots[group]
        assert counts is not None
        assert slots is not None
        for kept, new in ((self.keys, keys), (self.values, values)):
            old = kept[store]
            if old is None:
                old = new.new_zeros(len(counts), new.shape[1], 0, new.shape[2])
            if old.shape[2] < slots.shape[1]:
                grown = old.new_zeros(*old.shape[:2], slots.shape[1], old.shape[3])
                grown[:, :, : old.shape[2]] = old
                old = grown
            old[rows, :, columns] = new
            kept[store] = old

    def put_whole(self, store: int, keys: Tensor, values: Tensor) -> None:
        """Take over ``[B, Hkv, T, K]`` as the whole of a store that was empty: nothing is copied."""
        self.keys[store], self.values[store] = keys, values

    def longest(self, group: int) -> int:
        """Tokens in the longest row of a group."""
        counts = self.counts[group]
        return 0 if counts is None or not len(counts) else int(counts.max())

    def key_slots(self, group: int) -> Tensor:
        """``[B, longest]``: the slot of each stored token, -1 where a row has no more."""
        counts, slots = self.counts[group], self.slots[group]
        assert counts is not None
        assert slots is not None
        columns = torch.arange(self.longest(group), device=slots.device)
        return slots[:, : len(columns)].masked_fill(columns >= counts[:, None], -1)

    def crop(self, length: int) -> None:
        """Forget all slots but the first ``length``."""
        if self.depths is None or length >= self.length:
            return
        for group, (counts, slots) in enumerate(zip(self.counts, self.slots, strict=True)):
            if counts is None or slots is None:
                continue
            columns = torch.arange(slots.shape[1], device=slots.device)
            self.counts[group] = ((slots < length) & (columns < counts[:, None])).sum(1)
        self.depths = self.depths[:, :length]
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times, as beam search does."""
        if self.depths is None:
            return
        for kept in (self.keys, self.values, self.counts, self.slots):
            kept[:] = [None if each is None else each.index_select(0, rows.to(each.device)) for each in kept]  # type: ignore[index]
        self.depths = self.depths.index_select(0, rows.to(self.depths.device))

    def take_over(self, row: int, other: "RecursionCache") -> None:
        """Replace a row of this cache, which has room for it, by the only row of another."""
        for group in range(self.num_groups):
            counts, slots = self.counts[group], self.slots[group]
            theirs, their_slots = other.counts[group], other.slots[group]
            assert counts is not None
            assert slots is not None
            count = 0 if theirs is None else int(theirs[0])
            counts[row] = count
            if count and their_slots is not None:
                slots = _grown(slots, count, dim=1)
                slots[row, :count] = their_slots[0, :count]
                self.slots[group] = slots
        for store, group in enumerate(self.groups):
            counts, slots = self.counts[group], self.slots[group]
            assert counts is not None
            assert slots is not None
            count = int(counts[row])
            for kept, theirs_kept in ((self.keys, other.keys), (self.values, other.values)):
                new, old = theirs_kept[store], kept[store]
                if new is None:
                    continue
                if old is None:
                    old = new.new_zeros(len(counts), new.shape[1], 0, new.shape[3])
                if old.shape[2] < slots.shape[1]:
                    grown = old.new_zeros(*old.shape[:2], slots.shape[1], old.shape[3])
                    grown[:, :, : old.shape[2]] = old
                    old = grown
                old[row, :, :count] = new[0, :, :count]
                kept[store] = old


def _grown(tensor: Tensor, length: int, *, dim: int) -> Tensor:
    """The tensor with at least ``length`` entries along ``dim``: exact at first, then with room for more."""
    size = tensor.shape[dim]
    if size >= length:
        return tensor
    target = length if size == 0 else max(length, size + max(_GROWTH, size // 8))
    shape = list(tensor.shape)
    shape[dim] = target
    grown = tensor.new_zeros(shape)
    grown.narrow(dim, 0, size).copy_(tensor)
    return grown
