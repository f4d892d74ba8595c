"""MatMul-free LM: a language model whose every product is by -1, 0 or 1, and whose memory is a gated recurrence.

Paper: arXiv:2406.02528, "Scalable MatMul-free Language Modeling".
Original code: github.com/ridgerchu/matmulfreellm @ a016f72 (Apache-2.0); its ``model_type`` is ``hgrn_bit``. Parameter
names are its own, except ``embeddings``, which is ``embed_tokens`` here.

Differs from it:

- Padding keeps the state, on either side. There it only adds nothing to it, which is right on the left alone.
- Where ``position_ids`` go back to 0 inside a row, the state starts anew: documents packed into a row stay apart.
- No short convolutions and no wider states: with the settings of every released model, the original does not run them.
- Heads only reshape the state there, so that there are none here.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from zoo.errors import ConfigError
from zoo.families.matmulfree import MatMulFreeConfig
from zoo.layers import BitLinear, PackedBitLinear, alike, is_hooked
from zoo.models._causal_lm import CausalLM, Trunk, TrunkCache, TrunkOutput
from zoo.ops.bit_linear import choose as choose_bit_linear
from zoo.ops.bit_linear import cpu, is_unobserved
from zoo.ops.hgrn_scan import choose as choose_scan
from zoo.ops.hgrn_scan import hgrn_scan


class GatedRecurrence(nn.Module):
    """The token mixer, ``[B, T, D] -> [B, T, D]`` (the paper's Section 3.3, HGRN with ternary weights).

    Each channel of the state forgets by a gate of its own and takes in what the gate has left free.
    """

    def __init__(self, config: MatMulFreeConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.i_proj = BitLinear(width, width)
        self.f_proj = BitLinear(width, width)
        self.g_proj = BitLinear(width, width)
        self.g_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.o_proj = BitLinear(width, width)

    def reset_parameters(self) -> None:
        for projection in (self.i_proj, self.f_proj, self.g_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)

    def forward(
        self, x: Tensor, floor: Tensor | None, keep: Tensor | None, restart: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mix the tokens of each row.

        Args:
            x: ``[B, T, D]``.
            floor: The least that each channel keeps, ``[D]``; None for 0.
            keep: Padding, at which the state stays as it is, ``[B, T, 1]`` bool; None when there is none.
            restart: First tokens of documents, which see nothing before them, likewise.
            state: Before the first token, ``[B, D]``; None for zero.

        Returns:
            The output, and the state after the last token, ``[B, D]`` float32.
        """
        forget = torch.sigmoid(self.f_proj(x))
        if floor is not None:
            forget = floor + (1 - floor) * forget
        value = F.silu(self.i_proj(x)) * (1 - forget)
        if restart is not None:
            forget = forget.masked_fill(restart, 0.0)
        if keep is not None:
            forget, value = forget.masked_fill(keep, 1.0), value.masked_fill(keep, 0.0)
        states, state = hgrn_scan(forget, value, state)
        return self.o_proj(self.g_norm(self.g_proj(x)) * F.silu(states)), state


class GatedMlp(nn.Module):
    """The channel mixer, ``[..., D] -> [..., D]`` (the paper's Section 3.4)."""

    def __init__(self, config: MatMulFreeConfig) -> None:
        super().__init__()
        self.gate_proj = BitLinear(config.hidden_size, 2 * config.mlp_width)  # the gate, then what it lets through
        self.down_proj = BitLinear(config.mlp_width, config.hidden_size)
        self.down_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down_proj.weight, std=self.down_std)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * value)


class MatMulFreeBlock(nn.Module):
    """Token mixer and channel mixer, each behind a norm and beside a residual connection."""

    def __init__(self, config: MatMulFreeConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = GatedRecurrence(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMlp(config)

    def forward(
        self, x: Tensor, floor: Tensor | None, keep: Tensor | None, restart: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mixed, state = self.attn(self.attn_norm(x), floor, keep, restart, state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class MatMulFreeTrunk(Trunk):
    """Embeddings, blocks, norm. The cache holds the state of each block, ``[B, D]`` float32, by its number."""

    attributes = {"_no_split_modules": ["MatMulFreeBlock"], "_is_stateful": True}

    def __init__(self, config: MatMulFreeConfig) -> None:
        super().__init__(config)
        depth, width = config.num_hidden_layers, config.hidden_size
        # The first block's bound is 0 whatever this holds; several processes train only what has a gradient.
        self.lower_bounds = nn.Parameter(torch.zeros(depth, width), requires_grad=depth > 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(alike(MatMulFreeBlock, config) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self._blocks: _PackedBlocks | None = None

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lower_bounds)

    def make_head(self) -> nn.Linear:
        return BitLinear(self.arch.hidden_size, self.arch.vocab_size)

    def floors(self) -> Tensor:
        """The least share of its state that each channel of each block keeps, ``[L, D]``; more in later blocks."""
        shares = self.lower_bounds.float().softmax(dim=0)
        return (shares.cumsum(dim=0) - shares[0]).to(self.lower_bounds.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TrunkCache | None = None,
        keep_states: bool = False,
        **options: Any,
    ) -> TrunkOutput:
        tokens = x.shape[1]
        padding = None if mask is None else ~mask[:, -tokens:, None]
        restart = None
        if position_ids is not None and tokens > 1:  # the first token of a call goes on from the cache
            restart = F.pad(position_ids[:, 1:] == 0, (1, 0)).expand(len(x), -1)[..., None]
        states = {} if cache is None else cache.tensors
        if tokens == 1 and len(states) == len(self.layers) and padding is None and not keep_states:
            stepped = self._step(x[:, 0], [states[number] for number in range(len(self.layers))])
            if stepped is not None:
                x, after = stepped
                states.update(enumerate(after))
                return TrunkOutput(self.norm(x[:, None]))
        floors = self.floors()
        out = TrunkOutput(x, states=[x] if keep_states else [])
        for number, block in enumerate(self.layers):
            floor = floors[number] if number else None
            x, state = self.run(block, x, floor, padding, restart, states.get(number))
            if cache is not None:
                states[number] = state
            if keep_states:
                out.states.append(x)
        out.hidden = self.norm(x)
        return out

    def _step(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
        """All blocks for one new token of each row in one call of C++, bit by bit the same.

        Operators, and Python between them, start for longer than they run: a block's weights have pushed both out of
        the processor's caches. None where in any block a layer is not packed or something else than usual, a tensor is
        not on the CPU in float32, or somebody looks on.
        """
        if (
            not is_unobserved(x)
            or not cpu.EXTENSION.ready
            or choose_bit_linear.forced()
            or choose_scan.forced()
            or any(each.device.type != "cpu" or each.dtype is not torch.float32 for each in (x, *states))
        ):
            return None
        if self._blocks is None or not self._blocks.are_those_of(self):
            self._blocks = _PackedBlocks.of(self)
        return None if self._blocks is None else self._blocks.step(x, states, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}


class _PackedBlocks:
    """What ``matmulfree_step`` takes of a trunk's blocks, kept from token to token: finding it is an eighth of a step.

    A model's parts may be replaced at any time, and are compared with those that were found.
    """

    def __init__(self, trunk: MatMulFreeTrunk, layers: list[Tensor], norms: list[Tensor], eps: tuple[float, float]):
        self.layers, self.norms, self.eps = layers, norms, eps
        modules: list[Any] = list(trunk.layers.modules())
        self._modules, self._types = modules, list(map(type, modules))
        held = [of for module in modules for of in (module._modules, module._parameters, module._buffers)]
        self._held = [of for of in held if of]
        self._values = [value for of in self._held for value in of.values()]
        self._hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self._own = [module.__dict__ for module in modules]
        self._norms = [module for module in modules if type(module) is nn.RMSNorm]
        self._norms_eps = [norm.eps for norm in self._norms]
        self._norms_weights: list[Any] = [norm._parameters["weight"] for norm in self._norms]
        self._floors: Any = (None, None, None)  # what they were made of, held so that its address stays its own

    @classmethod
    def of(cls, trunk: MatMulFreeTrunk) -> "_PackedBlocks | None":
        """None where one call cannot take the blocks' place."""
        layers: list[Tensor] = []
        norms: list[Tensor] = []
        epsilons = set()
        for block in trunk.layers:
            found = _step_tensors(block)
            if found is None:
                return None
            layers += found[0]
            norms += found[1]
            epsilons |= found[2]
        return cls(trunk, layers, norms, *epsilons) if len(epsilons) == 1 else None

    def are_those_of(self, trunk: MatMulFreeTrunk) -> bool:
        """Whether the trunk's blocks consist of the same parts, and nobody looks into them."""
        values = [value for of in self._held for value in of.values()]
        return (
            trunk._modules["layers"] is self._modules[0]
            and len(values) == len(self._values)
            and all(map(operator.is_, values, self._values))
            and list(map(type, self._modules)) == self._types
            and [norm.eps for norm in self._norms] == self._norms_eps
            and all(weight.dtype is torch.float32 and weight.is_cpu for weight in self._norms_weights)
            and not any(self._hooks)
            and not any("forward" in own for own in self._own)
            and not _has_any_global_hook()
        )

    def step(self, x: Tensor, states: list[Tensor], trunk: MatMulFreeTrunk) -> tuple[Tensor, list[Tensor]] | None:
        bounds = trunk.lower_bounds
        if bounds.dtype is not torch.float32 or not bounds.is_cpu:
            return None
        version = None if bounds.is_inference() else bounds._version
        made_of, floors, _ = self._floors
        key = (bounds.data_ptr(), version, torch.get_num_threads())
        if made_of != key or version is None:
            floors = trunk.floors().contiguous()
            self._floors = (key, floors, bounds.detach())
        return cpu.matmulfree_step(x, states, floors, self.layers, self.norms, *self.eps)


def _step_tensors(block: Any) -> tuple[list[Tensor], list[Tensor], set[tuple[float, float]]] | None:
    """What ``matmulfree_step`` wants of a block: layers, norms, and each pair of their epsilons.

    None where it could not take the block's place.
    """
    if type(block) is not MatMulFreeBlock:
        return None
    of: Any = block._modules  # looked up here, as attributes of modules take their time
    attn, mlp = of["attn"], of["mlp"]
    if type(attn) is not GatedRecurrence or type(mlp) is not GatedMlp:
        return None
    layers: list[Any] = [attn._modules[name] for name in ("i_proj", "f_proj", "g_proj", "o_proj")]
    layers += [mlp._modules["gate_proj"], mlp._modules["down_proj"]]
    if any(type(layer) is not PackedBitLinear for layer in layers):
        return None
    norms: list[Any] = [of["attn_norm"], of["mlp_norm"], attn._modules["g_norm"]]
    inner: list[Any] = [layer._modules["norm"] for layer in layers]
    if any(type(norm) is not nn.RMSNorm for norm in (*norms, *inner)):
        return None
    if any(map(is_hooked, (block, attn, mlp, *layers, *norms))):
        return None
    weights = [norm._parameters["weight"] for norm in norms]
    tensors = []
    for layer, norm in zip(layers, inner, strict=True):
        tensors += [layer._buffers["packed"], layer._buffers["scale"], norm._parameters["weight"]]
    floats = (*weights, *tensors[1::3], *tensors[2::3])
    if any(each is None or each.dtype is not torch.float32 for each in floats):
        return None
    if not all(each.is_cpu and each.is_contiguous() for each in (*floats, *tensors[::3])):
        return None
    outer_eps = {norm.eps for norm in norms}
    if None in outer_eps:  # torch's own, by the dtype
        return None
    return tensors, weights, {(one, two.eps or 0.0) for one in outer_eps for two in inner}


def _from_hgrn_bit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from those of a released ``config.json``.

    Raises:
        ConfigError: For a setting that no released model has and the original code does not run.
    """
    released = {
        "hidden_act": ("swish", "silu"),
        "expand_ratio": (1, None),
        "hidden_ratio": (4, None),
        "use_short_conv": (False,),
        "use_lower_bound": (True,),
    }
    for name, known in released.items():
        if values.get(name, known[0]) not in known:
            raise ConfigError(f"{name} is {values[name]!r} in this hgrn_bit config; expected {known[0]!r}.")
    return {}


LM = CausalLM(
    "MatMulFree",
    model_type="matmulfree",
    config=MatMulFreeConfig,
    trunk=MatMulFreeTrunk,
    foreign={"hgrn_bit": _from_hgrn_bit},
    key_mapping={r"^model\.embeddings\.": "model.embed_tokens."},
    layer_types=lambda config: ["linear_attention"] * config.num_hidden_layers,
)
