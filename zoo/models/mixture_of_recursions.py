"""Mixture-of-Recursions: one shared stack of blocks, run as often as a router finds that each token needs it.

Paper: "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
arXiv:2507.10524. Original code: github.com/raymin0223/mixture_of_recursions @ 0c98df3 (Apache-2.0).

Training is that of the released code. What differs from it:

- Its top-k picks from the whole sequence in evaluation too, which no decoder can do. Here a token goes on by a
  threshold on its own router's probability, as the paper means it: a later token changes nothing.
  ``routing="topk"`` is theirs.
- A shared block exists once, and its parameters once in a state dict.
- Batches of any size with token choice; padding takes no part in the selection; packed documents do not see each other.

In this file N is the number of selected tokens, R of recursions, Hkv of key and value heads, L of cached tokens.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import TextConfig, axis
from zoo.errors import ConfigError, nearest
from zoo.layers import alike
from zoo.models._causal_lm import CausalLM, Trunk, TrunkOutput
from zoo.models._recursion_cache import RecursionCache
from zoo.registry import Family

_CHOICES = {
    "sharing": ("cycle", "sequence", "middle_cycle", "middle_sequence"),
    "router": ("none", "expert", "token"),
    "router_form": ("linear", "mlp", "wide_mlp"),
    "gating": ("weighted", "none"),
    "balancing": ("loss", "loss_free", "none"),
    "kv_mode": ("recursion", "share", "update"),
}
ROUTINGS = ("topk", "threshold")
_LOOP_FROM = 1 << 14  # cached numbers of a row from which decoding looks at rows one by one, rather than copy them


@dataclass(frozen=True, kw_only=True)
class MixtureOfRecursionsConfig(TextConfig):
    """A Llama whose middle is a shared stack of blocks. The defaults are the paper's 360M, R = 3, expert choice."""

    vocab_size: int = axis("vocabulary", 49_152, multiple_of=64)
    hidden_size: int = axis("width", 960, multiple_of=64)
    intermediate_size: int = axis("width", 2560, multiple_of=64)
    num_hidden_layers: int = axis("depth", 32)
    num_attention_heads: int = 15
    num_key_value_heads: int = 5
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0

    num_recursions: int = 3
    sharing: str = "middle_cycle"  # which block each layer uses: section 2.2.1 of the paper
    share_norms: bool = True  # otherwise each layer has its own two norms
    lora_rank: int = 0  # of each layer's own change to the shared linear layers; 0: they share all
    router: str = "expert"  # "none": a recursive transformer, in which every token takes every recursion
    router_form: str = "linear"
    router_temperature: float = 1.0  # that the hidden state is divided by
    gating: str = "weighted"  # "none": what the block returns is added as it is
    alpha: float = 0.1  # factor of the router's probability
    capacities: tuple[float, ...] = ()  # of expert choice: share of all tokens in each recursion; (): (R - r) / R
    capacity_warmup_steps: int = 0  # over which they come down from 1
    aux_loss_coef: float = 0.001  # of the binary cross-entropy that makes the router a threshold
    z_loss_coef: float = 0.0
    aux_router: bool = False  # a second router on the detached state learns to say what the first one chose
    balancing: str = "loss"  # of token choice
    balancing_coef: float = 0.1
    bias_update_rate: float = 0.001  # of balancing "loss_free"
    kv_mode: str = "recursion"  # "share": keys and values of the first recursion serve all; "update": with fresh ones
    thresholds: tuple[float, ...] = ()  # probability from which a token goes on; (): 0.5, 0 where a capacity keeps all
    depth_bias: float = 0.0  # added once per recursion to the logarithm of a token choice's probability
    router_quantiles: tuple[tuple[float, ...], ...] = ()  # of each recursion's probabilities: set_compute_budget

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        self.check_positive(
            "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_recursions", "rope_theta"
        )
        self.check_positive("router_temperature", "alpha")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(
                    f"{name}.{field} is {value!r}; expected one of {', '.join(choices)}.{nearest(value, choices)}"
                )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ConfigError(
                f"{name}.hidden_size is {self.hidden_size}; expected {self.num_attention_heads} heads of an even width."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{name}.num_key_value_heads is {self.num_key_value_heads}; expected a divisor of the "
                f"{self.num_attention_heads} heads."
            )
        own, repeats = self.own_layers, self.num_recursions
        middle = self.num_hidden_layers - own
        if middle < repeats or middle % repeats:
            below = max(middle // repeats, 1) * repeats + own
            raise ConfigError(
                f"{name}.num_hidden_layers is {self.num_hidden_layers}; expected a multiple of {repeats} recursions"
                f"{f' and {own} layers of their own' if own else ''}; the nearest are {below} and {below + repeats}."
            )
        for field in ("lora_rank", "capacity_warmup_steps", "aux_loss_coef", "z_loss_coef", "balancing_coef"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{name}.{field} is {getattr(self, field)}; expected 0 or more.")
        if self.router != "none" and self.sharing not in ("cycle", "middle_cycle"):
            raise ConfigError(
                f"{name}.sharing is {self.sharing!r}; a router needs recursions over whole stacks, 'cycle' or "
                "'middle_cycle'."
            )
        if self.kv_mode != "recursion" and self.sharing not in ("cycle", "middle_cycle"):
            raise ConfigError(
                f"{name}.kv_mode is {self.kv_mode!r}; expected 'recursion' with sharing {self.sharing!r}."
            )
        if self.aux_router and self.router != "expert":
            raise ConfigError(f"{name}.aux_router belongs to expert choice; router is {self.router!r}.")
        self._check_shares()

    def _check_shares(self) -> None:
        name, repeats = type(self).__name__, self.num_recursions
        shares = self.capacities
        if shares and self.router != "expert":
            raise ConfigError(f"{name}.capacities belong to expert choice; router is {self.router!r}.")
        for field in ("capacities", "thresholds"):
            if getattr(self, field) and len(getattr(self, field)) != repeats:
                raise ConfigError(
                    f"{name}.{field} is {getattr(self, field)}; expected one for each of {repeats} recursions."
                )
        if any(not 0 < share <= 1 for share in shares):
            raise ConfigError(f"{name}.capacities is {shares}; expected shares of the tokens, more than 0, at most 1.")
        if any(later > earlier for earlier, later in pairwise(shares)):
            raise ConfigError(
                f"{name}.capacities is {shares}, which increase; a recursion takes tokens of the one before it alone, "
                f"expected for example {tuple(sorted(shares, reverse=True))}."
            )
        if any(not 0 <= threshold <= 1 for threshold in self.thresholds):
            raise ConfigError(f"{name}.thresholds is {self.thresholds}; expected probabilities, 0 to 1.")
        if shares and shares[0] < 1 and self.kv_mode != "recursion":
            raise ConfigError(
                f"{name}.capacities is {shares}; kv_mode {self.kv_mode!r} needs 1.0 first, as the first recursion "
                "makes the keys and values of all tokens."
            )

    def granularity(self, name: str, index: int) -> int:
        """Widths are whole groups of heads: heads stay as wide as they are, and as many share keys and values."""
        if name == "hidden_size":
            return self.head_dim * self._heads_per_key
        return super().granularity(name, index)

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Heads follow the width; layers are the own ones, and the shared stack as often as there are recursions."""
        fitted = super().fit(changes)
        if "hidden_size" in fitted:
            heads = fitted["hidden_size"] // self.head_dim
            fitted |= {"num_attention_heads": heads, "num_key_value_heads": heads // self._heads_per_key}
        if "num_hidden_layers" in fitted:
            shared = (fitted["num_hidden_layers"] - self.own_layers) / self.num_recursions
            fitted["num_hidden_layers"] = self.own_layers + self.num_recursions * max(1, round(shared))
        return fitted

    @property
    def _heads_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def own_layers(self) -> int:
        """Layers at the ends that share nothing: 2 or 0."""
        return 2 if self.sharing.startswith("middle") else 0

    @property
    def base_depth(self) -> int:
        """Blocks of the shared stack."""
        return (self.num_hidden_layers - self.own_layers) // self.num_recursions

    @property
    def block_of(self) -> tuple[int, ...]:
        """For each layer that a token passes, which block it is."""
        base, first = self.base_depth, self.own_layers // 2
        middle = range(base * self.num_recursions)
        shared = [i // self.num_recursions if self.sharing.endswith("sequence") else i % base for i in middle]
        if not first:
            return tuple(shared)
        return (0, *(1 + block for block in shared), 1 + base)

    @property
    def shares(self) -> tuple[float, ...]:
        """The capacity of each recursion."""
        repeats = self.num_recursions
        if self.router != "expert":
            return (1.0,) * repeats
        return self.capacities or tuple((repeats - r) / repeats for r in range(repeats))

    @property
    def decision_thresholds(self) -> tuple[float, ...]:
        """The probability from which a token goes on, of each recursion."""
        if self.thresholds:
            return self.thresholds
        before = (1.0, *self.shares)
        return tuple(0.0 if now == was else 0.5 for was, now in zip(before, self.shares, strict=False))

    @property
    def cache_groups(self) -> tuple[int, ...]:
        """For each layer, which of a cache's groups of tokens it stores; 0 is every token, 1 + r recursion r's."""
        first, base = self.own_layers // 2, self.base_depth
        middle = base * self.num_recursions
        if self.router == "none" or self.kv_mode == "update":
            return (0,) * self.num_hidden_layers
        if self.kv_mode == "share":
            return (0,) * (first + base + first)
        return (0,) * first + tuple(1 + i // base for i in range(middle)) + (0,) * first

    def store_of(self, layer: int) -> int:
        """Which of a cache's stores holds a layer's keys and values."""
        first, base = self.own_layers // 2, self.base_depth
        if self.kv_mode != "share" or self.router == "none" or layer < first + base:
            return layer
        middle = base * self.num_recursions
        return first + (layer - first) % base if layer < first + middle else layer - middle + base

    def kv_bytes_per_token(self, depth: float | None = None, itemsize: int = 2) -> float:
        """Bytes of cache that a token takes.

        Args:
            depth: Mean number of recursions that tokens take; None for what the capacities say.
            itemsize: Bytes of a number.
        """
        mean = sum(self.shares) if depth is None else depth
        stores = len(self.cache_groups)
        if self.router != "none" and self.kv_mode == "recursion":
            stores = self.own_layers + self.base_depth * mean  # type: ignore[assignment]
        return 2 * self.num_key_value_heads * self.head_dim * itemsize * stores


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class RelaxedLinear(nn.Linear):
    """A shared linear layer to which each use adds a product of its own: relaxed recursion, arXiv:2410.20672."""

    def __init__(self, dim_in: int, dim_out: int, *, uses: int, rank: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)
        self.lora = LowRank(dim_in, dim_out, uses, rank)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(x) + self.lora(x, use)


class LowRank(nn.Module):
    """Per use, a linear map of low rank that starts at zero."""

    def __init__(self, dim_in: int, dim_out: int, uses: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(uses, rank, dim_in))
        self.up = nn.Parameter(torch.empty(uses, dim_out, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Down as a linear layer of torch starts, up at zero."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor, use: int) -> Tensor:
        return F.linear(F.linear(x, self.down[use]), self.up[use])


class Block(nn.Module):
    """Pre-norm attention and SwiGLU of Llama, on tokens in any arrangement: ``[..., D] -> [..., D]``.

    Args:
        config: The model's.
        uses: How often a token may pass this block.
    """

    def __init__(self, config: MixtureOfRecursionsConfig, uses: int) -> None:
        super().__init__()
        dim, hidden, width = config.hidden_size, config.intermediate_size, config.head_dim
        self.head_dim = width
        self.relaxed = config.lora_rank > 0 and uses > 1
        norms = 1 if config.share_norms else uses

        def linear(dim_in: int, dim_out: int) -> nn.Linear:
            if self.relaxed:
                return RelaxedLinear(dim_in, dim_out, uses=uses, rank=config.lora_rank)
            return nn.Linear(dim_in, dim_out, bias=False)

        def norm() -> nn.Module:
            own = [nn.RMSNorm(dim, config.rms_norm_eps) for _ in range(norms)]
            return own[0] if norms == 1 else nn.ModuleList(own)

        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(dim, config.num_attention_heads * width),
                "k_proj": linear(dim, config.num_key_value_heads * width),
                "v_proj": linear(dim, config.num_key_value_heads * width),
                "o_proj": linear(config.num_attention_heads * width, dim),
            }
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": linear(dim, hidden), "up_proj": linear(dim, hidden), "down_proj": linear(hidden, dim)}
        )
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(self, x: Tensor, tokens: "Tokens", layer: int, use: int) -> Tensor:
        """One use of the block.

        Args:
            x: The tokens' hidden states.
            tokens: Where they stand, and how they attend.
            layer: Which of the unrolled layers this is.
            use: How often the block was used before.
        """
        attend, mlp = self.self_attn, self.mlp
        y = self._norm(self.input_layernorm, use)(x)
        heads = (-1, self.head_dim)
        q = tokens.rotate(self._linear(attend["q_proj"], y, use).unflatten(-1, heads))
        k = v = None
        if tokens.writes:
            k = tokens.rotate(self._linear(attend["k_proj"], y, use).unflatten(-1, heads))
            v = self._linear(attend["v_proj"], y, use).unflatten(-1, heads)
        out = tokens.attend(layer, q, k, v)
        x = x + self._linear(attend["o_proj"], out.flatten(-2), use)
        y = self._norm(self.post_attention_layernorm, use)(x)
        y = F.silu(self._linear(mlp["gate_proj"], y, use)) * self._linear(mlp["up_proj"], y, use)
        return x + self._linear(mlp["down_proj"], y, use)

    def _linear(self, layer: nn.Module, x: Tensor, use: int) -> Tensor:
        return layer(x, use) if self.relaxed else layer(x)

    @staticmethod
    def _norm(norms: nn.Module, use: int) -> nn.Module:
        return norms[use] if isinstance(norms, nn.ModuleList) else norms


def make_router(config: MixtureOfRecursionsConfig) -> nn.Module:
    """Logits ``[..., D] -> [..., 1]`` of expert choice, ``[..., R]`` of token choice."""
    dim, out = config.hidden_size, config.num_recursions if config.router == "token" else 1
    if config.router_form == "linear":
        return nn.Linear(dim, out, bias=False)
    # The released code's "wide" router is its "mlp" router.
    return nn.Sequential(nn.Linear(dim, 2 * dim, bias=False), nn.GELU(), nn.Linear(2 * dim, out, bias=False))


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens run, and how they attend


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
        rope: "Rope",
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
        config: MixtureOfRecursionsConfig,
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
                counts = cache.counts[self.group]
                assert counts is not None
                return attend_rows(q.flatten(0, -3), keys, values, self.rows, counts).view_as(q)
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
        if config.kv_mode != "update" or cache is None:
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


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Attention of one new token for each of some rows to all that their rows hold.

    Args:
        q: ``[N, H, K]``.
        keys, values: ``[B, Hkv, capacity, K]``.
        rows: ``[N]``, each at most once.
        counts: ``[B]``, how much of the capacity is filled.

    Returns:
        ``[N, H, K]``.
    """
    # The query heads of a key head are as many queries, so that no key has to be repeated for them.
    q = q.unflatten(1, (keys.shape[1], -1))
    lengths = counts[rows].tolist()
    longest = max(lengths)
    everything = len(rows) == len(keys) and min(lengths) == longest
    if everything and bool((rows[1:] > rows[:-1]).all()):
        out = F.scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest])
    elif keys.shape[1] * keys.shape[3] * longest >= _LOOP_FROM and q.device.type == "cpu":
        out = torch.cat(
            [
                F.scaled_dot_product_attention(q[i : i + 1], keys[row : row + 1, :, :n], values[row : row + 1, :, :n])
                for i, (row, n) in enumerate(zip(rows.tolist(), lengths, strict=True))
            ]
        )
    else:
        columns = torch.arange(longest, device=q.device)
        mask = (columns < counts[rows][:, None])[:, None, None]
        out = F.scaled_dot_product_attention(q, keys[rows, :, :longest], values[rows, :, :longest], mask)
    return out.flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Routing


@dataclass
class Routing:
    """What the routers did in a pass.

    Attributes:
        depths: ``[B, T]`` int64, recursions that each token took; -1 for padding.
        logits: Per recursion, ``[B, N/B]`` of the tokens that were left; of token choice ``[B, T, R]``.
        selected: Per recursion of expert choice in training, ``[B, k]``: the columns that were kept, ascending.
        aux_loss: Binary cross-entropy of the selection, summed over recursions.
        accuracy: Share of decisions by threshold that are the selection's, mean over recursions.
        z_loss: Mean squared log-sum-exp of the logits, summed over recursions.
        balancing_loss: Of token choice.
    """

    depths: Tensor
    logits: list[Tensor] = dataclasses.field(default_factory=list)
    selected: list[Tensor] = dataclasses.field(default_factory=list)
    aux_loss: Tensor | None = None
    accuracy: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None

    @property
    def mean_depth(self) -> float:
        """Recursions that a token took on average, padding apart."""
        return float(self.depths[self.depths >= 0].double().mean())

    def loss(self, config: MixtureOfRecursionsConfig) -> Tensor | None:
        """What training adds to the cross-entropy; None outside it."""
        terms = [
            coefficient * term
            for coefficient, term in (
                (config.aux_loss_coef, self.aux_loss),
                (config.z_loss_coef, self.z_loss),
                (config.balancing_coef, self.balancing_loss),
            )
            if term is not None and coefficient
        ]
        return torch.stack(terms).sum() if terms else None


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


def choose_top(seen: Tokens, scores: Tensor, share: float, everything: Tokens) -> Tensor | None:
    """Expert choice: in each row, the ``max(1, int(share * T))`` best of the tokens that are left.

    Args:
        seen: The tokens that are left.
        scores: Of each.
        share: Of the row's tokens; padding does not count.
        everything: The chunk's tokens, which that share is of.

    Returns:
        Which of them are kept, bool in the shape of ``scores``; None for all.
    """
    if seen.flat is None:
        kept = max(1, int(share * everything.slots.shape[1]))
        if kept >= scores.shape[1]:
            return None
        chosen = scores.topk(kept, 1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    kept_of = (share * everything.counts.double()).long().clamp(min=1)
    padded = scores.new_full((seen.chunk.batch_size, seen.width), -math.inf)
    padded = padded.index_put((seen.rows, seen.ranks), scores)
    order = padded.argsort(1, descending=True).argsort(1)
    return (order < kept_of[:, None])[seen.rows, seen.ranks]


class MixtureOfRecursions(Trunk):
    """Embedded tokens to hidden states: own first layer, the shared stack up to R times, own last layer, norm.

    Attributes:
        routing: How expert choice selects: ``"topk"`` as in training, ``"threshold"`` causally; None: by the mode.
        step: Training steps done, which the capacity warm-up goes by. Counted here unless :meth:`set_step` is used.
        last: What the routers did in the last pass.
    """

    def __init__(self, config: MixtureOfRecursionsConfig) -> None:
        super().__init__(config)
        uses = Counter(config.block_of)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(alike(Block, config, uses[block]) for block in sorted(uses))
        num_routers = {"none": 0, "expert": config.num_recursions, "token": 1}[config.router]
        self.routers = nn.ModuleList(make_router(config) for _ in range(num_routers))
        self.aux_routers = nn.ModuleList(make_router(config) for _ in range(num_routers * config.aux_router))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.router_bias: Tensor
        if config.balancing == "loss_free" and config.router == "token":
            self.register_buffer("router_bias", torch.zeros(config.num_recursions))
        self.routing: str | None = None
        self.step = 0
        self._steps_are_set = False
        self.last: Routing | None = None
        self.reset_mean_depth()

    @property
    def config(self) -> MixtureOfRecursionsConfig:
        """The family's config: what calibration finds becomes part of it."""
        return self.arch  # type: ignore[return-value]

    def reset_mean_depth(self) -> None:
        """Count the depths of tokens from here on."""
        self._depths: tuple[Any, Any] = (0, 0)  # sum, tokens; tensors once there are any, so that nothing waits

    @property
    def mean_depth(self) -> float:
        """Recursions that a token took, on average over all passes since :meth:`reset_mean_depth`."""
        total, tokens = self._depths
        return float(total) / max(int(tokens), 1)

    def make_cache(self) -> RecursionCache:
        """An empty cache for this trunk."""
        return RecursionCache(self.config, self.config.cache_groups, 1 + self.config.num_recursions)

    def set_step(self, step: int) -> None:
        """Say how many optimiser steps are done: the capacity warm-up goes by it. A trainer that resumes needs this."""
        self.step, self._steps_are_set = step, True

    def current_shares(self) -> tuple[float, ...]:
        """The capacities now: those of the config, above them during the warm-up."""
        config = self.config
        if not self.training or not config.capacity_warmup_steps:
            return config.shares
        done = min(1.0, (self.step + 1) / config.capacity_warmup_steps)
        left = (1 + math.cos(math.pi * done)) / 2
        return tuple(share + (1 - share) * left for share in config.shares)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        keep_states: bool = False,
        routing: str | None = None,
        **options: Any,
    ) -> TrunkOutput:
        """As :meth:`Trunk.forward`, with ``routing`` for this pass."""
        config, (batch_size, length) = self.config, x.shape[:2]
        routing = routing or self.routing or ("topk" if self.training else "threshold")
        if routing not in ROUTINGS:
            raise ConfigError(f"routing is {routing!r}; expected {' or '.join(map(repr, ROUTINGS))}.")
        if x.is_meta:  # where costs are counted: no value says who goes on, so as many do as the capacities say
            routing, cache = "topk", None
        past = 0 if cache is None else cache.length
        if cache is None and config.kv_mode != "recursion" and config.router != "none":
            cache = self.make_cache()  # where later recursions find the keys of the first one
        mask = None if mask is None else mask[:, -length:]
        chunk = Chunk((batch_size, length), position_ids, mask, past, cache, self.rope, x)
        flat: Any = None if chunk.real is None else chunk.real.nonzero(as_tuple=True)
        everything = Tokens(chunk, config, 0, flat=flat)
        states = [x]
        x = self._run_own(x, everything, 0)
        if config.own_layers:
            states.append(x)
        depths = torch.zeros((batch_size, length), dtype=torch.int64, device=x.device)
        if chunk.real is not None:
            depths = depths.masked_fill(~chunk.real, -1)
        record = Routing(depths)
        if config.router == "expert":
            x = self._expert_choice(x, everything, record, routing, states)
        elif config.router == "token":
            x = self._token_choice(x, everything, record, states)
        else:
            x = self._recurse(x, everything, record, states)
        if cache is not None:
            cache.extend(record.depths)
        x = self._run_own(x, everything, config.num_hidden_layers - 1)
        if config.own_layers:
            states.append(x)
        x = self.norm(x)
        states[-1] = x
        if self.training and not self._steps_are_set:
            self.step += 1
        self.last = record
        total, tokens = self._depths
        self._depths = (total + record.depths.clamp(min=0).sum(), tokens + (record.depths >= 0).sum())
        loss = record.loss(config) if self.training else None
        return TrunkOutput(x, loss, states if keep_states else [], {"routing": record, "router_loss": loss})

    # The layers

    def _run_own(self, x: Tensor, everything: Tokens, layer: int) -> Tensor:
        """The first or last layer, which all tokens pass; nothing where all layers are shared."""
        if not self.config.own_layers:
            return x
        block = self.layers[self.config.block_of[layer]]
        return everything.put(x, self._run_block(block, everything.gather(x), everything, layer, 0))

    def run_stack(self, x: Tensor, tokens: Tokens, recursion: int) -> Tensor:
        """The shared stack once, on some tokens' hidden states."""
        config = self.config
        first = config.own_layers // 2 + recursion * config.base_depth
        for layer in range(first, first + config.base_depth):
            x = self._run_block(self.layers[config.block_of[layer]], x, tokens, layer, recursion)
        return x

    def _run_block(self, block: nn.Module, x: Tensor, tokens: Tokens, layer: int, use: int) -> Tensor:
        # A cache would be written twice if the block ran again in the backward pass.
        if tokens.chunk.cache is not None:
            return block(x, tokens, layer, use)
        return self.run(block, x, tokens, layer, use)

    # Which tokens pass them

    def _recurse(self, x: Tensor, everything: Tokens, record: Routing, states: list[Tensor]) -> Tensor:
        config = self.config
        first, seen = config.own_layers // 2, Counter[int]()
        y = everything.gather(x)
        for layer in range(first, config.num_hidden_layers - first):
            block = config.block_of[layer]
            y = self._run_block(self.layers[block], y, everything, layer, seen[block])
            seen[block] += 1
            states.append(y if everything.flat is None else everything.put(x, y))
        record.depths = record.depths.masked_fill(record.depths >= 0, config.num_recursions)
        return everything.put(x, y)

    def _expert_choice(
        self, x: Tensor, everything: Tokens, record: Routing, routing: str, states: list[Tensor]
    ) -> Tensor:
        config = self.config
        seen = everything
        losses, accuracies, z_losses = [], [], []
        for recursion, share in enumerate(self.current_shares()):
            h = seen.gather(x)
            logits = self.routers[recursion](h / config.router_temperature).squeeze(-1)
            weights = config.alpha * logits.sigmoid()
            decisive = self.aux_routers[recursion](h.detach()).squeeze(-1) if config.aux_router else logits
            record.logits.append(decisive.detach() if config.aux_router else logits)
            if routing == "topk":
                keep = choose_top(seen, weights, share, everything)
            else:
                keep = self.goes_on(decisive, recursion)
            if self.training:
                target = torch.ones_like(logits) if keep is None else keep.to(logits.dtype)
                losses.append(F.binary_cross_entropy_with_logits(decisive, target))
                with torch.no_grad():
                    accuracies.append(((decisive.sigmoid() >= 0.5) == target.bool()).double().mean())
                z_losses.append(logits.square().mean())  # the log-sum-exp of one logit is that logit
            seen, chosen = self._narrow(seen, keep, recursion, everything)
            if routing == "topk" and seen.flat is None:
                record.selected.append(seen.slots - seen.chunk.past)
            if not seen.rows.numel():  # every token is through
                everything.keep_keys(range(recursion, config.num_recursions))
                break
            y = self.run_stack(seen.gather(x), seen, recursion)
            if chosen is not None:
                weights = weights.gather(1, chosen) if chosen.is_meta else weights[chosen].view(seen.slots.shape)
            x = seen.add(x, y * weights[..., None] if config.gating == "weighted" else y)
            record.depths = seen.add(record.depths[..., None], torch.ones_like(seen.slots)[..., None])[..., 0]
            states.append(x)
        if self.training:
            record.aux_loss = torch.stack(losses).sum()
            record.accuracy = torch.stack(accuracies).mean()
            record.z_loss = torch.stack(z_losses).sum()
        return x

    def goes_on(self, logits: Tensor, recursion: int) -> Tensor | None:
        """Which tokens a recursion takes by its threshold, bool like ``logits``; None for all."""
        threshold = self.config.decision_thresholds[recursion]
        return None if threshold == 0.0 else logits.sigmoid() >= threshold

    def _token_choice(self, x: Tensor, everything: Tokens, record: Routing, states: list[Tensor]) -> Tensor:
        config, repeats = self.config, self.config.num_recursions
        h = everything.gather(x)
        logits = self.routers[0](h / config.router_temperature)
        probabilities = config.alpha * logits.softmax(-1)
        depth = self.chosen_depth(logits)
        record.logits.append(logits)
        if self.training:
            chosen = F.one_hot(depth, repeats).to(logits.dtype).flatten(0, -2).mean(0)
            record.balancing_loss = repeats * (probabilities.flatten(0, -2).mean(0) * chosen).sum()
            record.z_loss = logits.logsumexp(-1).square().mean()
            if config.balancing == "loss_free":
                with torch.no_grad():
                    self.router_bias.add_(config.bias_update_rate * (1 / repeats - chosen).sign())
            if config.balancing != "loss":
                record.balancing_loss = None
        carried = x
        for recursion in range(repeats):
            keep = None if recursion == 0 else depth >= recursion
            if x.is_meta:  # balanced, as training wants it
                keep = choose_top(everything, logits[..., 0], 1 - recursion / repeats, everything)
            seen, _ = self._narrow(everything, keep, recursion, everything)
            if not seen.rows.numel():
                everything.keep_keys(range(recursion, repeats))
                break
            carried = seen.put(carried, self.run_stack(seen.gather(carried), seen, recursion))
            record.depths = seen.add(record.depths[..., None], torch.ones_like(seen.slots)[..., None])[..., 0]
            states.append(carried)
        y = everything.gather(carried)
        if config.gating == "weighted":
            y = y * probabilities.gather(-1, depth[..., None])
        return everything.add(x, y)

    def chosen_depth(self, logits: Tensor) -> Tensor:
        """Token choice: the last recursion of each token, 0 to R - 1, from ``[..., R]``."""
        config = self.config
        scores = config.alpha * logits.softmax(-1)
        if config.balancing == "loss_free":
            scores = scores + self.router_bias
        if config.depth_bias:
            steps = torch.arange(config.num_recursions, device=logits.device)
            scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log() + config.depth_bias * steps
        return scores.argmax(-1)

    def _narrow(
        self, seen: Tokens, keep: Tensor | None, recursion: int, everything: Tokens
    ) -> tuple[Tokens, Tensor | None]:
        """Some of ``seen``, as the tokens of a recursion; ``keep`` is None where it is all of them."""
        config, chunk = self.config, seen.chunk
        base = None if config.kv_mode == "recursion" or recursion == 0 else everything
        group = 1 + recursion if config.kv_mode == "recursion" else 0
        if config.kv_mode != "recursion" and recursion == 0:
            return everything, None  # whose keys and values serve all
        if keep is not None and keep.is_meta:
            kept = max(1, int(self.current_shares()[recursion] * chunk.length))
            if config.router == "token":
                kept = max(1, int((1 - recursion / config.num_recursions) * chunk.length))
            index = chunk.slots[:, :kept]
            return Tokens(chunk, config, group, index, None, base), index
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is None:
            return Tokens(chunk, config, group, seen.index, seen.flat, base), None
        columns = seen.slots - chunk.past
        if seen.flat is not None:
            return Tokens(chunk, config, group, None, (seen.flat[0][keep], columns[keep]), base), keep
        counts = keep.sum(1)
        if bool((counts == counts[0]).all()) and int(counts[0]):
            return Tokens(chunk, config, group, columns[keep].view(chunk.batch_size, -1), None, base), keep
        rows = torch.arange(chunk.batch_size, device=keep.device)[:, None].expand_as(keep)
        return Tokens(chunk, config, group, None, (rows[keep], columns[keep]), base), keep


# ---------------------------------------------------------------------------------------------------------------------
# Compute budgets: methods of the transformers model


def budget_shares(shares: tuple[float, ...], budget: float) -> tuple[float, ...]:
    """Capacities whose mean is a budget: powers of the given ones, so that their order stays.

    Args:
        shares: The config's capacities.
        budget: Share of the recursions that tokens take on average, up to 1.

    Raises:
        ConfigError: If no power gives this mean.
    """
    lowest = sum(share == 1.0 for share in shares) / len(shares)
    if not lowest < budget <= 1.0:
        raise ConfigError(
            f"The compute budget is {budget:g}; expected more than {lowest:.3g}, as {lowest * len(shares):.0f} of "
            f"{len(shares)} recursions take every token, and at most 1."
        )
    low, high = 0.0, 1.0
    while sum(share**high for share in shares) / len(shares) > budget:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        above = sum(share**middle for share in shares) / len(shares) > budget
        low, high = (middle, high) if above else (low, middle)
    return tuple(share**high for share in shares)


@torch.no_grad()
def calibrate(model: Any, tokens: Tensor, budget: float | None = None) -> float:
    """Move the thresholds so that held-out text takes as much computation as training did, or as a budget says.

    The quantiles of the routers' probabilities become part of the config, so that :func:`set_compute_budget` needs no
    text later.

    Args:
        model: The transformers model.
        tokens: Held-out text, ``[B, T]``.
        budget: Share of the recursions that tokens take on average; None for the config's capacities.

    Returns:
        The mean depth of this text then, in recursions.

    Raises:
        ConfigError: If the model has no router, or the budget cannot be had.
    """
    trunk, config = model.model, model.model.arch
    if config.router == "none":
        raise ConfigError("A recursive model without a router takes every recursion; there is nothing to calibrate.")
    was_training = model.training
    model.eval()
    if config.router == "token":
        goal = config.num_recursions * (budget if budget is not None else (1 + 1 / config.num_recursions) / 2)
        _check_token_budget(goal / config.num_recursions, config.num_recursions)
        trunk.arch = config.override(depth_bias=0.0)
        low, high = -50.0, 50.0
        scores = _router_logits(model, tokens)[0]
        for _ in range(50):
            trunk.arch = config.override(depth_bias=(low + high) / 2 or 1e-9)
            above = float(trunk.chosen_depth(scores).double().mean()) + 1 > goal
            low, high = (low, trunk.arch.depth_bias) if above else (trunk.arch.depth_bias, high)
        _adopt(model, trunk.arch)
    else:
        shares = config.shares if budget is None else budget_shares(config.shares, budget)
        thresholds, quantiles = [1.0] * config.num_recursions, []
        before = 1.0
        for recursion, share in enumerate(shares):
            trunk.arch = config.override(thresholds=tuple(thresholds))
            logits = _router_logits(model, tokens)
            arrived = logits[recursion].flatten().sigmoid().double() if len(logits) > recursion else torch.ones(1)
            quantiles.append(tuple(arrived.quantile(torch.linspace(0, 1, 65, dtype=arrived.dtype)).tolist()))
            kept = round(share / before * len(arrived))
            thresholds[recursion] = 0.0 if share == before else _kth_largest(arrived, kept)
            before = share
        _adopt(model, config.override(thresholds=tuple(thresholds), router_quantiles=tuple(quantiles)))
    trunk.reset_mean_depth()
    model(tokens)
    depth = trunk.mean_depth
    trunk.reset_mean_depth()
    model.train(was_training)
    return depth


def _kth_largest(values: Tensor, k: int) -> float:
    """Between the k-th and the next, so that rounding moves no value across."""
    ordered = values.sort(descending=True).values
    if k <= 0:
        return 1.0
    return float(ordered[k - 1] if k >= len(ordered) else (ordered[k - 1] + ordered[k]) / 2)


def _router_logits(model: Any, tokens: Tensor) -> list[Tensor]:
    model(tokens, use_cache=False)
    return model.model.last.logits


def _adopt(model: Any, config: MixtureOfRecursionsConfig) -> None:
    """Make this the model's config, in both of its forms."""
    model.model.arch = config
    for name in ("thresholds", "depth_bias", "router_quantiles"):
        setattr(model.config, name, getattr(config, name))


def _check_token_budget(budget: float, repeats: int) -> None:
    if not 1 / repeats <= budget <= 1:
        raise ConfigError(f"The compute budget is {budget:g}; expected {1 / repeats:.3g} to 1.")


def set_compute_budget(model: Any, budget: float, tokens: Tensor | None = None) -> None:
    """Trade quality for speed: move the thresholds so that tokens take this share of the recursions on average.

    Args:
        model: The transformers model.
        budget: For example 0.6.
        tokens: Text to calibrate on, ``[B, T]``; None to go by what an earlier :func:`calibrate` found.

    Raises:
        ConfigError: If the budget cannot be had, or there is neither text nor an earlier calibration.
    """
    config = model.model.arch
    if tokens is not None or config.router == "none":
        calibrate(model, tokens, budget)  # type: ignore[arg-type]
        return
    if not config.router_quantiles:
        raise ConfigError("This model was not calibrated; expected tokens of held-out text beside the budget.")
    thresholds, before = [], 1.0
    for share, quantiles in zip(budget_shares(config.shares, budget), config.router_quantiles, strict=True):
        place = (1 - share / before) * (len(quantiles) - 1)
        below = min(int(place), len(quantiles) - 2)
        value = quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])
        thresholds.append(0.0 if share == before else min(max(value, 1e-12), 1.0))
        before = share
    _adopt(model, config.override(thresholds=tuple(thresholds)))


@contextmanager
def routing(model: Any, kind: str) -> Iterator[None]:
    """Let expert choice select by ``"topk"``, as in training, or by ``"threshold"``, causally, while this lasts."""
    trunk = getattr(model, "model", model)
    before, trunk.routing = trunk.routing, kind
    try:
        yield
    finally:
        trunk.routing = before


MixtureOfRecursions.attributes = {
    "_no_split_modules": ["Block"],
    "calibrate": calibrate,
    "set_compute_budget": set_compute_budget,
    "routing": routing,
    "set_step": lambda model, step: model.model.set_step(step),
    "mean_depth": property(lambda model: model.model.mean_depth),
    "reset_mean_depth": lambda model: model.model.reset_mean_depth(),
}


def released_names(config: MixtureOfRecursionsConfig) -> list[tuple[str, str]]:
    """(name in the released code, name here), for all parameters: theirs are numbered after unrolling."""
    embeddings = "model.embed_tokens.*"
    pairs = [(embeddings, embeddings), ("model.norm.*", "model.norm.*")]
    pairs.append(("lm_head.*", embeddings if config.tie_word_embeddings else "lm_head.*"))
    first, base = config.own_layers // 2, config.base_depth
    for layer, block in enumerate(config.block_of):
        recursion, place = divmod(layer - first, base)
        if config.router == "none" or layer < first:
            theirs = f"model.layers.{layer}"
        elif recursion == config.num_recursions:  # the last layer
            theirs = f"model.layers.{1 + config.num_recursions if config.router == 'expert' else 2}"
        elif config.router == "expert":
            theirs = f"model.layers.{first + recursion}.block.{place}"
        else:
            theirs = f"model.layers.{first}.block_list.{recursion}.{place}"
        pairs.append((f"{theirs}.*", f"model.layers.{block}.*"))
    if config.router == "expert":
        for kind, own in (("mor_router", "routers"), ("mlp_router", "aux_routers")):
            pairs += [
                (f"model.layers.{first + r}.{kind}.router.*", f"model.{own}.{r}.*")
                for r in range(config.num_recursions)
                if own == "routers" or config.aux_router
            ]
    elif config.router == "token":
        pairs.append((f"model.layers.{first}.mor_router.router.*", "model.routers.0.*"))
        if config.balancing == "loss_free":
            pairs.append((f"model.layers.{first}.router_bias", "model.router_bias"))
    return pairs


FAMILY = Family(
    "mixture_of_recursions",
    config=MixtureOfRecursionsConfig,
    model=CausalLM(
        "MixtureOfRecursions",
        model_type="mixture_of_recursions",
        config=MixtureOfRecursionsConfig,
        trunk=MixtureOfRecursions,
    ),
    title="Mixture-of-Recursions",
    paper="arXiv:2507.10524",
    code="github.com/raymin0223/mixture_of_recursions @ 0c98df3",
    licence="Apache-2.0",
    task="text-generation",
    layout=released_names,
)

# SmolLM's shapes, as the paper's appendix has them: width, hidden width, layers, heads, key and value heads.
_SHAPES = {
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
    "730m": (1536, 4096, 26, 24, 8),
    "1_7b": (2048, 8192, 24, 32, 32),
}


def _sized(size: str, recursions: int, router: str) -> MixtureOfRecursionsConfig:
    """One of the paper's sizes. Where R does not divide the middle layers, the shared stack is rounded up, as the
    authors did at 360M with R = 4: 34 layers.
    """
    dim, hidden, layers, heads, kv_heads = _SHAPES[size]
    base = -(-(layers - 2) // recursions)
    return MixtureOfRecursionsConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=2 + base * recursions,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_recursions=recursions,
        router=router,
        alpha=1.0 if router == "token" else 0.1,
        z_loss_coef=1e-5 if router == "token" else 0.0,
    )


def _register_sizes() -> None:
    for size in _SHAPES:
        for recursions in (2, 3, 4):
            for router, prefix, suffix in (
                ("expert", "mor", "_expert"),
                ("token", "mor", "_token"),
                ("none", "recursive", ""),
            ):

                def variant(
                    size: str = size, recursions: int = recursions, router: str = router
                ) -> MixtureOfRecursionsConfig:
                    return _sized(size, recursions, router)

                variant.__name__ = variant.__qualname__ = f"{prefix}_{size}_r{recursions}{suffix}"
                variant.__doc__ = f"The paper's {size.upper().replace('_', '.')}, R = {recursions}, router: {router}."
                FAMILY.variant(variant)


_register_sizes()


@FAMILY.variant
def mor_2m_r3() -> MixtureOfRecursionsConfig:
    """1.6 M parameters, 8 layers deep, on bytes: trains on a CPU in minutes."""
    return MixtureOfRecursionsConfig(
        vocab_size=257,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


@FAMILY.variant
def mor_14m_r3() -> MixtureOfRecursionsConfig:
    """14 M parameters, 20 layers deep, for a small tokenizer's 4,096 tokens."""
    return MixtureOfRecursionsConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=20,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
