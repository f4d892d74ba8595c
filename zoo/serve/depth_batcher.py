"""Continuous depth-wise batching of Mixture-of-Recursions (arXiv:2507.10524, section 4).

The block that all recursions share does not mind how deep a token is. So each pass through it takes one token of every
sequence, whatever recursion that token is in; a sequence whose token is through gets its next one for the following
pass, and one that is finished makes room for another. Decoding a batch in step instead runs the block again for fewer
and fewer tokens.

In this file S is the number of places for sequences, N of tokens in a pass.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, ShapeError
from zoo.models._recursion_cache import RecursionCache
from zoo.models.mixture_of_recursions import MixtureOfRecursions
from zoo.ops.attend_rows import attend_rows

_logger = logging.getLogger(__name__)


@dataclass
class Generated:
    """What became of a prompt.

    Attributes:
        prompt: Its tokens.
        tokens: The new ones, the end of text included.
        depths: Recursions that each token of prompt and answer took, but for the last, which nothing had to follow.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)


@dataclass
class _Sequence:
    """A sequence that has a place."""

    number: int
    left: int  # tokens still to write
    result: Generated
    generator: torch.Generator | None
    depth: int = 0  # recursions that the current token has taken
    last: int = 0  # token choice: the recursion after which it is through


class _Pass:
    """What a block needs to know of N tokens, of which each is another sequence's, at perhaps different depths."""

    writes = True

    def __init__(self, batcher: "DepthBatcher", rows: Tensor, depths: list[int] | None) -> None:
        self.batcher, self.rows = batcher, rows
        self.chunk = batcher  # whose `cache` tells the trunk not to run blocks twice
        self.columns = batcher.columns[rows]
        self.cos, self.sin = batcher.trunk.rope(self.columns[:, None], batcher.dtype)
        # Which of the tokens are at each depth, None for all of them; no entry for the first and last layer.
        self.at: dict[int, Tensor | None] = {}
        if depths is not None:
            every = torch.tensor(depths, device=rows.device)
            found = sorted(set(depths))
            self.at = {depth: (every == depth).nonzero()[:, 0] if len(found) > 1 else None for depth in found}
        # By depth and group: rows of the cache, columns in it, and how many tokens the rows hold then.
        self.placed: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of ``[N, H, K]``."""
        near, far = x.chunk(2, -1)
        return x * self.cos + torch.cat((-far, near), -1) * self.sin

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each token attends to what its own sequence holds at its own depth: ``[N, H, K]``.

        Args:
            layer: Of the first recursion; or the first or last one.
            q: ``[N, H, K]``.
            k, v: ``[N, Hkv, K]``.
        """
        config = self.batcher.trunk.config
        if not self.at:
            store = config.store_of(layer)
            return self._attend(0, None, store, q, k, v, write=(store,))
        out = torch.empty_like(q)
        for depth, mine in self.at.items():
            store = config.store_of(layer + depth * config.base_depth)
            write: tuple[int, ...] = (store,)
            if config.router != "none" and config.kv_mode == "share" and depth:
                write = ()
            elif config.router != "none" and config.kv_mode == "update":  # deeper ones keep these until they have fresh
                write = tuple(layer + d * config.base_depth for d in range(depth, config.num_recursions))
            if mine is None:
                return self._attend(depth, None, store, q, k, v, write=write)
            out[mine] = self._attend(depth, mine, store, q[mine], k[mine], v[mine], write=write)
        return out

    def _attend(
        self, depth: int, mine: Tensor | None, store: int, q: Tensor, k: Tensor, v: Tensor, *, write: Iterable[int]
    ) -> Tensor:
        cache = self.batcher.cache
        group = cache.groups[store]
        if (depth, group) not in self.placed:
            rows, columns = (each if mine is None else each[mine] for each in (self.rows, self.columns))
            if group:
                columns = cache.place(group, rows, columns, len(self.batcher.columns))
            counts = cache.counts[group]
            assert counts is not None
            self.placed[depth, group] = rows, columns, counts[rows]
        rows, columns, held = self.placed[depth, group]
        for each in write:
            cache.put(each, rows, columns, k, v)
        keys, values = cache.keys[store], cache.values[store]
        assert keys is not None
        assert values is not None
        return attend_rows(q, keys, values, rows, held)


class _PackedLinear(nn.Module):
    """A linear layer without bias whose weight is laid out for multiplying few rows: ``[N, D] -> [N, E]``."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach(), 32)

    def forward(self, x: Tensor, *, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, activation, [], "")

    def add(self, x: Tensor, to: Tensor) -> Tensor:
        """What it makes of ``x``, added to ``[N, E]``."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.packed, None, "add")


class _PackedBlock(nn.Module):
    """A block's forward pass on packed weights: as that of the trunk's ``Block``, in fewer operators."""

    def __init__(self, block: Any) -> None:
        super().__init__()

        def weight(name: str) -> Tensor:
            return block.get_parameter(f"{name}.weight")

        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.sizes = [weight(name).shape[0] // block.head_dim for name in names[:2]]  # heads of queries, and of keys
        self.head_dim = block.head_dim
        self.norms = block.input_layernorm, block.post_attention_layernorm  # of each use, where uses have their own
        self.qkv = _PackedLinear(*map(weight, names))
        self.out, self.gate = _PackedLinear(weight("self_attn.o_proj")), _PackedLinear(weight("mlp.gate_proj"))
        self.up, self.down = _PackedLinear(weight("mlp.up_proj")), _PackedLinear(weight("mlp.down_proj"))

    def forward(self, x: Tensor, tokens: _Pass, layer: int, use: int) -> Tensor:
        before, after = (norms[use] if isinstance(norms, nn.ModuleList) else norms for norms in self.norms)
        q, k = self.sizes
        heads = self.qkv(before(x)).unflatten(-1, (-1, self.head_dim))
        turned = tokens.rotate(heads[:, : q + k])
        y = tokens.attend(layer, turned[:, :q], turned[:, q:], heads[:, q + k :])
        x = self.out.add(y.flatten(-2), x)
        y = after(x)
        return self.down.add(self.gate(y, activation="swish") * self.up(y), x)


class DepthBatcher:
    """Writes the continuations of many prompts, a token of each sequence in every pass through the shared block.

    A sequence's result does not depend on the others.

    Args:
        model: A Mixture-of-Recursions model of :func:`zoo.create_model`, with or without a router.
        max_sequences: How many are worked on at once; others wait for a place.
        temperature: Of sampling; 0 takes the likeliest token.
        top_k: Sample from so many of the likeliest tokens; 0 for all.
        top_p: Sample from the likeliest tokens that have this probability together.
        seed: Of sampling: prompt i draws from ``seed + i``.
        eos_token_id: Ends a sequence; None for the model's own.
        pack: Keep a second copy of the weights as oneDNN wants them, which small batches multiply faster by; None: for
            float32 on a CPU. The model may not be trained meanwhile.

    Attributes:
        passes: Passes through the shared block so far.
        tokens_passed: Tokens in them, over all passes.

    Raises:
        ConfigError: If the model is of another family, or shares its layers so that recursions are no passes.

    Example:
        >>> batcher = DepthBatcher(model)
        >>> for prompt in prompts:
        ...     batcher.submit(prompt, max_new_tokens=100)
        >>> results = batcher.run()
    """

    def __init__(
        self,
        model: Any,
        *,
        max_sequences: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | None = None,
        pack: bool | None = None,
    ) -> None:
        trunk = getattr(model, "model", None)
        if not isinstance(trunk, MixtureOfRecursions):
            raise ConfigError(f"{type(model).__name__} has no shared block; expected a Mixture-of-Recursions model.")
        config = trunk.config
        if config.sharing.endswith("sequence"):
            raise ConfigError(
                f"sharing is {config.sharing!r}; expected 'cycle' or 'middle_cycle', whose recursions pass."
            )
        if max_sequences < 1 or not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                f"max_sequences is {max_sequences}, temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}; "
                "expected at least 1, 0 and 0, and more than 0 up to 1."
            )
        self.model, self.trunk = model, trunk
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.eos = config.eos_token_id if eos_token_id is None else eos_token_id
        weight = trunk.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        if pack is None:
            pack = self.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        packed = pack and not config.lora_rank
        self.blocks: list[Any] = [_PackedBlock(block) if packed else block for block in trunk.layers]
        self.head: Any = _PackedLinear(model.lm_head.weight) if packed else model.lm_head
        self.cache: RecursionCache = trunk.make_cache()
        for group in range(self.cache.num_groups):
            self.cache.counts[group] = torch.zeros(max_sequences, dtype=torch.int64, device=self.device)
            self.cache.slots[group] = torch.zeros(max_sequences, 0, dtype=torch.int64, device=self.device)
        self.columns = torch.zeros(max_sequences, dtype=torch.int64, device=self.device)  # [S], the current token's
        self.hidden = weight.new_zeros(max_sequences, config.hidden_size)
        self.entered = weight.new_zeros(max_sequences, config.hidden_size)  # token choice: what came in
        self.gates = weight.new_ones(max_sequences)
        self.places: list[_Sequence | None] = [None] * max_sequences
        self.undecided: list[int] = []  # rows whose token a router, or the end of the recursions, has to stop or not
        self.waiting: deque[_Sequence] = deque()
        self.finished: dict[int, Generated] = {}
        self.submitted = self.passes = self.tokens_passed = 0
        self._warned = False  # of positions
        # Per-layer norms and relaxations make tokens of different depths different to the block.
        self._mixes = config.share_norms and not config.lora_rank

    def submit(self, prompt: Sequence[int] | Tensor, max_new_tokens: int = 100) -> int:
        """Queue a prompt.

        Args:
            prompt: Its tokens, at least one.
            max_new_tokens: After which its sequence ends.

        Returns:
            Its number, counted from 0.

        Raises:
            ShapeError: If it is empty, or holds a token that the model does not know.
        """
        tokens = [int(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
        vocab = self.trunk.embed_tokens.num_embeddings
        if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            raise ShapeError(f"The prompt is {tokens[:8]}; expected at least one token, each from 0 to {vocab - 1}.")
        if max_new_tokens < 1:
            raise ShapeError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
        most = self.trunk.config.max_position_embeddings
        if len(tokens) + max_new_tokens > most and not self._warned:
            self._warned = True
            _logger.warning("A text may pass the model's %d positions, beyond which it was not trained.", most)
        number = self.submitted
        self.submitted += 1
        generator = torch.Generator().manual_seed(self.seed + number) if self.temperature else None
        self.waiting.append(_Sequence(number, max_new_tokens, Generated(tokens), generator))
        return number

    def run(self) -> list[Generated]:
        """Work until every sequence is finished; results in the order of their submission."""
        while self.step():
            pass
        return [self.finished[number] for number in range(self.submitted)]

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what there is room for, and pass the shared block once; returns whether there is anything left."""
        was_training = self.model.training
        self.model.eval()
        self._settle()
        fresh = [row for row, place in enumerate(self.places) if place is None and self._admit(row)]
        self._enter(fresh)
        self._settle()
        rows = [row for row, place in enumerate(self.places) if place is not None]
        if rows:
            self._pass(rows)
        self.model.train(was_training)
        return bool(self.waiting) or bool(rows)

    def _settle(self) -> None:
        """Decide who goes on, and see off who does not, until every token that is here goes on."""
        while self.undecided:
            rows, self.undecided = sorted(self.undecided), []
            self._leave(sorted(self._through(rows)))

    def _admit(self, row: int) -> bool:
        """Read a waiting prompt into a free row and write its first token; False if none waits for long enough."""
        while self.waiting:
            sequence = self.waiting.popleft()
            cache = self.model.make_cache()
            ids = torch.tensor([sequence.result.prompt], device=self.device)
            logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
            sequence.result.depths += cache.state.depths[0].tolist()
            self.columns[row] = cache.state.length - 1
            if self._write(row, sequence, logits[0, -1]):
                continue  # that was all
            self.cache.take_over(row, cache.state)
            self.places[row] = sequence
            return True
        return False

    def _write(self, row: int, sequence: _Sequence, logits: Tensor) -> bool:
        """Append a token; returns whether the sequence is finished."""
        if sequence.generator is None:
            token = int(logits.argmax())
        else:
            logits = logits.float().cpu() / self.temperature
            if self.top_k:
                least = logits.topk(min(self.top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < least, -math.inf)
            if self.top_p < 1:
                ordered, order = logits.sort()
                small = ordered.softmax(0).cumsum(0) <= 1 - self.top_p
                small[-1] = False
                logits = logits.masked_fill(small.scatter(0, order, small), -math.inf)
            token = int(torch.multinomial(logits.softmax(0), 1, generator=sequence.generator))
        sequence.result.tokens.append(token)
        sequence.left -= 1
        if sequence.left == 0 or token == self.eos:
            self.finished[sequence.number] = sequence.result
            return True
        return False

    def _sequence(self, row: int) -> _Sequence:
        sequence = self.places[row]
        assert sequence is not None
        return sequence

    def _enter(self, rows: list[int]) -> None:
        """Embed the newest token of some rows and run the first layer."""
        if not rows:
            return
        config, index = self.trunk.config, torch.tensor(rows, device=self.device)
        self.columns[index] += 1
        counts, slots = self.cache.counts[0], self.cache.slots[0]
        assert counts is not None
        assert slots is not None
        counts[index] = self.columns[index]  # take_over has counted the tokens before
        self.cache.place(0, index, self.columns[index], len(self.columns))
        tokens = torch.tensor([self._sequence(row).result.tokens[-1] for row in rows], device=self.device)
        x = self.trunk.embed_tokens(tokens)
        if config.own_layers:
            x = self.blocks[0](x, _Pass(self, index, None), 0, 0)
        self.hidden[index] = x
        for row in rows:
            self._sequence(row).depth = 0
        self.undecided += rows
        if config.router == "token":
            logits = self.trunk.routers[0](x / config.router_temperature)
            chosen = self.trunk.chosen_depth(logits)
            self.entered[index] = x
            self.gates[index] = (config.alpha * logits.softmax(-1)).gather(-1, chosen[:, None])[:, 0]
            for row, depth in zip(rows, chosen.tolist(), strict=True):
                self._sequence(row).last = depth

    def _through(self, rows: list[int]) -> set[int]:
        """Which of these rows' tokens take no further recursion; the others' gates are set."""
        trunk, config = self.trunk, self.trunk.config
        through = {row for row in rows if self._sequence(row).depth == config.num_recursions}
        if config.router == "token":
            return through | {row for row in rows if self._sequence(row).depth > self._sequence(row).last}
        if config.router == "none":
            return through
        by_depth: dict[int, list[int]] = {}
        for row in rows:
            if row not in through:
                by_depth.setdefault(self._sequence(row).depth, []).append(row)
        for depth, some in by_depth.items():
            index = torch.tensor(some, device=self.device)
            h = self.hidden[index]
            logits = trunk.routers[depth](h / config.router_temperature)[:, 0]
            self.gates[index] = config.alpha * logits.sigmoid()
            decisive = trunk.aux_routers[depth](h)[:, 0] if config.aux_router else logits
            keep = trunk.goes_on(decisive, depth)
            if keep is not None:
                through |= {row for row, stays in zip(some, keep.tolist(), strict=True) if not stays}
        return through

    def _pass(self, rows: list[int]) -> None:
        """The shared block, once, for the tokens of these rows."""
        self.passes += 1
        self.tokens_passed += len(rows)
        depths = [self._sequence(row).depth for row in rows]
        if self._mixes:
            self._pass_rows(rows, depths, 0)
            return
        for depth in sorted(set(depths)):
            some = [row for row, its in zip(rows, depths, strict=True) if its == depth]
            self._pass_rows(some, [depth] * len(some), depth)

    def _pass_rows(self, rows: list[int], depths: list[int], use: int) -> None:
        config = self.trunk.config
        index = torch.tensor(rows, device=self.device)
        tokens, x = _Pass(self, index, depths), self.hidden[index]
        y, first = x, config.own_layers // 2
        for layer in range(first, first + config.base_depth):
            y = self.blocks[config.block_of[layer]](y, tokens, layer, use)
        if config.router == "expert":
            y = x + (y * self.gates[index, None] if config.gating == "weighted" else y)
        self.hidden[index] = y
        for row in rows:
            self._sequence(row).depth += 1
        self.undecided += rows

    def _leave(self, rows: list[int]) -> None:
        """Last layer and head for the tokens that are through; their sequences get the next token, or end."""
        if not rows:
            return
        trunk, config = self.trunk, self.trunk.config
        index = torch.tensor(rows, device=self.device)
        x = self.hidden[index]
        if config.router == "token":
            y = x * self.gates[index, None] if config.gating == "weighted" else x
            x = self.entered[index] + y
        if config.own_layers:
            last = config.num_hidden_layers - 1
            x = self.blocks[config.block_of[last]](x, _Pass(self, index, None), last, 0)
        logits = self.head(trunk.norm(x))
        entering = []
        for row, scores in zip(rows, logits, strict=True):
            sequence = self._sequence(row)
            sequence.result.depths.append(sequence.depth)
            if self._write(row, sequence, scores):
                self.places[row] = None
            else:
                entering.append(row)
        self._enter(entering)
