"""Mixture-of-Recursions in numbers. The network is :mod:`zoo.models.mixture_of_recursions`."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zoo.config import TextConfig, axis
from zoo.errors import ConfigError, nearest
from zoo.registry import Family

_CHOICES = {
    "sharing": ("cycle", "sequence", "middle_cycle", "middle_sequence"),
    "router": ("none", "expert", "token"),
    "router_form": ("linear", "mlp", "wide_mlp"),
    "gating": ("weighted", "none"),
    "balancing": ("loss", "loss_free", "none"),
    "kv_mode": ("recursion", "share", "update"),
}


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
    model="zoo.models.mixture_of_recursions:LM",
    title="Mixture-of-Recursions",
    paper="arXiv:2507.10524",
    code="github.com/raymin0223/mixture_of_recursions @ 0c98df3",
    licence="Apache-2.0",
    task="text-generation",
    layout=released_names,
)


# Width, hidden width, layers, heads, key and value heads: SmolLM's for 135M, 360M and 1.7B. There is no SmolLM of 730M,
# and of that shape no source was at hand: it comes to 729.9 M parameters where nothing is shared, and is to be checked
# against the paper's appendix before anything is compared with it.
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
