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
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from zoo.errors import ConfigError
from zoo.families.matmulfree import MatMulFreeConfig
from zoo.layers import BitLinear, PackedBitLinear, alike, has_hooks
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

    _floors: Any = (None, 0, None)  # the bounds they were made of, by how many threads, the floors

    def __init__(self, config: MatMulFreeConfig) -> None:
        super().__init__(config)
        depth, width = config.num_hidden_layers, config.hidden_size
        # The first block's bound is 0 whatever this holds; several processes train only what has a gradient.
        self.lower_bounds = nn.Parameter(torch.zeros(depth, width), requires_grad=depth > 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(alike(MatMulFreeBlock, config) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

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
        if padding is not None and padding.is_cpu and not torch.compiler.is_compiling() and not padding.any():
            padding = None  # it lies before these tokens, in the cache
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
            or not x.is_cpu
            or x.dtype is not torch.float32
            or not cpu.EXTENSION.ready
            or choose_bit_linear.forced()
            or choose_scan.forced()
            or _has_any_global_hook()
        ):
            return None
        layers: list[Any] = []
        norms: list[Any] = []
        norm_eps: set[Any] = set()
        layer_eps: set[Any] = set()
        for block in self.layers:
            if not _add_step_tensors(block, layers, layer_eps, norms, norm_eps):
                return None
        floors = self._kept_floors()
        if floors is None or len(norm_eps) != 1 or len(layer_eps) != 1 or None in norm_eps:  # None: by the dtype
            return None
        return cpu.matmulfree_step(x, states, floors, layers, norms, *norm_eps, *layer_eps)

    def _kept_floors(self) -> Tensor | None:
        """:meth:`floors`, kept from token to token, as they take as long as a block; None unless float32 on a CPU."""
        made_of, threads, floors = self._floors
        bounds = self.lower_bounds
        if bounds.dtype is not torch.float32 or not bounds.is_cpu:
            return None
        # With other threads torch's softmax divides the work otherwise, which may change the last bit.
        if floors is None or threads != torch.get_num_threads() or not torch.equal(made_of, bounds):
            threads, floors = torch.get_num_threads(), self.floors().contiguous()
            self._floors = (bounds.detach().clone(), threads, floors)
        return floors

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_floors"}


def _add_step_tensors(block: Any, layers: list[Any], layer_eps: set[Any], norms: list[Any], norm_eps: set[Any]) -> bool:
    """Add what ``matmulfree_step`` wants of a block: the tensors of layers and norms, and their epsilons.

    This runs for each block and token, and looks modules up where they are kept, since attributes take their time.

    Returns:
        Whether that could take the block's place.
    """
    if type(block) is not MatMulFreeBlock:
        return False
    parts: Any = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    if type(attn) is not GatedRecurrence or type(mlp) is not GatedMlp:
        return False
    if has_hooks(block) or has_hooks(attn) or has_hooks(mlp):
        return False
    mixer, channels = attn._modules, mlp._modules
    for norm in (parts["attn_norm"], parts["mlp_norm"], mixer["g_norm"]):
        if type(norm) is not nn.RMSNorm or has_hooks(norm):
            return False
        norms.append(norm._parameters.get("weight"))
        norm_eps.add(norm.eps)
    mixing = [mixer[name] for name in ("i_proj", "f_proj", "g_proj", "o_proj")]
    for layer in (*mixing, channels["gate_proj"], channels["down_proj"]):
        if type(layer) is not PackedBitLinear or has_hooks(layer):
            return False
        norm, tensors = layer._modules["norm"], layer._buffers
        if type(norm) is not nn.RMSNorm:
            return False
        layers += (tensors.get("packed"), tensors.get("scale"), norm._parameters.get("weight"))
        layer_eps.add(norm.eps or 0.0)
    return not any(each is None for each in (*layers[-18:], *norms[-3:]))  # None: gone, or no parameter any more


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
