"""Mixture-of-Recursions: one shared stack of blocks, run as often as a router finds that each token needs it.

Paper: "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
arXiv:2507.10524. Original code: github.com/raymin0223/mixture_of_recursions @ 0c98df3 (Apache-2.0).

Training is that of the released code. What differs from it:

- Its top-k picks from the whole sequence in evaluation too, which no decoder can do. Here a token goes on by a
  threshold on its own router's probability, as the paper means it: a later token changes nothing.
  ``routing="topk"`` is theirs.
- A shared block exists once, and its parameters once in a state dict.
- Batches of any size with token choice; padding takes no part in the selection; packed documents do not see each other.

In this file N is the number of selected tokens, R of recursions. Beside it, `_recursion_tokens.py` has the gathering
and attention of selected tokens, `_recursion_cache.py` their caches, `_recursion_budget.py` what calibrates thresholds.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.families.mixture_of_recursions import MixtureOfRecursionsConfig
from zoo.layers import alike
from zoo.models._causal_lm import CausalLM, Trunk, TrunkOutput
from zoo.models._recursion_budget import calibrate, set_compute_budget
from zoo.models._recursion_cache import RecursionCache
from zoo.models._recursion_tokens import Chunk, Rope, Tokens

_logger = logging.getLogger(__name__)

ROUTINGS = ("topk", "threshold")


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

    def forward(self, x: Tensor, tokens: Tokens, layer: int, use: int) -> Tensor:
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

    def detached(self) -> "Routing":
        """The same without autograd's memory of how it came to be, which would be kept alive with it."""

        def free(value: Any) -> Any:
            if isinstance(value, list):
                return [each.detach() for each in value]
            return None if value is None else value.detach()

        return Routing(**{spec.name: free(getattr(self, spec.name)) for spec in dataclasses.fields(self)})

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
        self._warned = False
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
            if self.gradient_checkpointing and self.training and not self._warned:
                self._warned = True
                _logger.warning(
                    "activations are not checkpointed: with a router and kv_mode=%r no block can run twice; expected "
                    "kv_mode='recursion'",
                    config.kv_mode,
                )
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
        self.last = record.detached()
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
        if threshold == 0.0:
            return None
        # Of logits, since in float32 the probabilities of a router that is sure are all 1.
        return logits >= (math.inf if threshold == 1.0 else math.log(threshold / (1 - threshold)))

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
# Methods of the transformers model


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
    "rate_scales": {"model.aux_routers.": 10.0},  # of the recipe's learning rate, as the released code has it
    "calibrate": calibrate,
    "set_compute_budget": set_compute_budget,
    "routing": routing,
    "set_step": lambda model, step: model.model.set_step(step),
    "mean_depth": property(lambda model: model.model.mean_depth),
    "reset_mean_depth": lambda model: model.model.reset_mean_depth(),
}


LM = CausalLM(
    "MixtureOfRecursions",
    model_type="mixture_of_recursions",
    config=MixtureOfRecursionsConfig,
    trunk=MixtureOfRecursions,
)
