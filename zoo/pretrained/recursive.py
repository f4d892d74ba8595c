"""A pretrained dense Llama as the beginning of a recursive model, to be trained further."""

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, nearest
from zoo.factory import build
from zoo.families.mixture_of_recursions import MixtureOfRecursionsConfig
from zoo.models.mixture_of_recursions import Block, MixtureOfRecursions, RelaxedLinear

INITS = ("average", "stepwise", "lower", "upper", "random")


@torch.no_grad()
def convert_to_recursive(
    model: nn.Module,
    recursions: int = 3,
    sharing: str = "middle_cycle",
    init: str = "average",
    *,
    router: str = "none",
    lora_rank: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Share the layers of a dense model, and perhaps put routers between them, ready for uptraining.

    Args:
        model: A causal language model of transformers with Llama's blocks: RMSNorm, rotation, SwiGLU, no biases.
        recursions: How often the shared layers are run.
        sharing: Which layers become one: ``"cycle"``, ``"sequence"``, or ``"middle_cycle"`` and ``"middle_sequence"``,
            which leave the first and last layer alone.
        init: What a shared layer starts as: ``"average"`` of the layers that it stands for, ``"lower"`` or ``"upper"``,
            the first or last of them, ``"stepwise"``, layers at equal steps through the whole depth
            (arXiv:2410.20672, section 2.3), or ``"random"``.
        router: ``"none"`` for a recursive transformer, ``"expert"`` or ``"token"`` for Mixture-of-Recursions; its
            routers are new.
        lora_rank: Let each use of a shared layer differ by a product of this rank, which starts as the best one for
            what the sharing took away (section 2.4); 0 for none.
        **overrides: Other fields of the config, for example ``share_norms=False``, which keeps every layer's norms.

    Returns:
        A model of the family ``mixture_of_recursions``, in the dense model's dtype, in training mode.

    Raises:
        ConfigError: If the model has other blocks, or its layers do not divide.
    """
    if init not in INITS:
        raise ConfigError(f"init is {init!r}; expected one of {', '.join(INITS)}.{nearest(init, INITS)}")
    config = _config_of(model, recursions, sharing, router, lora_rank, overrides)
    twin: Any = build(config, dtype=next(model.parameters()).dtype)
    source: Any = model
    dense = list(source.model.layers)
    twin.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight)
    twin.model.norm.weight.copy_(source.model.norm.weight)
    if not config.tie_word_embeddings:
        twin.lm_head.weight.copy_(source.lm_head.weight)
    for number, block in enumerate(twin.model.layers):
        uses = [layer for layer, own in enumerate(config.block_of) if own == number]
        if len(uses) == 1 or init != "random":
            _fill(block, [dense[use] for use in uses], _chosen(config, number, uses, init, dense))
    if getattr(source, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(source.generation_config)
    return twin.train()


def _chosen(config: MixtureOfRecursionsConfig, number: int, uses: list[int], init: str, dense: list[Any]) -> list[Any]:
    """The layers of which a block becomes the mean."""
    if init == "average" or len(uses) == 1:
        return [dense[use] for use in uses]
    if init == "stepwise":
        first = config.own_layers // 2
        steps = np.linspace(first, config.num_hidden_layers - 1 - first, config.base_depth).round().astype(int)
        return [dense[steps[number - first]]]
    return [dense[uses[0] if init == "lower" else uses[-1]]]


def _fill(block: Block, uses: list[Any], chosen: list[Any]) -> None:
    """A block's weights from dense layers, and what each use has of its own."""
    for part, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            shared: Any = block.get_submodule(f"{part}.{name}")
            shared.weight.copy_(_mean([layer.get_submodule(f"{part}.{name}").weight for layer in chosen]))
            if isinstance(shared, RelaxedLinear):
                for use, layer in enumerate(uses):
                    missing = layer.get_submodule(f"{part}.{name}").weight.double() - shared.weight.double()
                    _factorise(missing, shared.lora.up[use], shared.lora.down[use])
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm: Any = block.get_submodule(name)
        if isinstance(norm, nn.ModuleList):
            each: Any
            for each, layer in zip(norm, uses, strict=True):
                each.weight.copy_(layer.get_submodule(name).weight)
        else:
            norm.weight.copy_(_mean([layer.get_submodule(name).weight for layer in chosen]))


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)


def _factorise(matrix: Tensor, up: Tensor, down: Tensor) -> None:
    """The best product of this rank, by its singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(up.shape[1], len(values))
    root = values[:rank].sqrt()
    up.zero_()
    down.zero_()
    up[:, :rank] = left[:, :rank] * root
    down[:rank] = root[:, None] * right[:rank]


def _config_of(
    model: Any, recursions: int, sharing: str, router: str, lora_rank: int, overrides: dict[str, Any]
) -> MixtureOfRecursionsConfig:
    given = getattr(model, "config", None)
    layers: Any = getattr(getattr(model, "model", None), "layers", None)
    blocks = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
    known = layers is not None and all(any(name == path for name, _ in layers[0].named_modules()) for path in blocks)
    if isinstance(getattr(model, "model", None), MixtureOfRecursions):
        raise ConfigError(f"{type(model).__name__} is recursive already; expected a dense LlamaForCausalLM.")
    if given is None or not known:
        raise ConfigError(f"{type(model).__name__} has no Llama-like layers; expected for example a LlamaForCausalLM.")
    biases = [name for name, _ in layers[0].named_parameters() if name.endswith("bias")]
    extra = [name for name, _ in layers[0].named_children() if "norm" in name and name not in blocks][1:]
    if biases or extra or getattr(given, "hidden_act", "silu") != "silu":
        found = ", ".join([*biases, *extra]) or f"hidden_act {given.hidden_act!r}"
        raise ConfigError(f"{type(model).__name__} has {found}; expected Llama's blocks: no biases, two norms, SwiGLU.")
    rope = dict(getattr(given, "rope_parameters", None) or getattr(given, "rope_scaling", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"The rotary positions are of type {rope['rope_type']!r}; expected 'default', without scaling."
        )
    width = getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads
    if width * given.num_attention_heads != given.hidden_size:
        raise ConfigError(
            f"Heads are {width} wide; expected hidden_size / heads, {given.hidden_size // given.num_attention_heads}."
        )
    names = {spec.name for spec in dataclasses.fields(MixtureOfRecursionsConfig)}
    fields = {name: value for name, value in given.to_dict().items() if name in names}
    if isinstance(fields.get("eos_token_id"), list):  # the others stay in the generation config
        fields["eos_token_id"] = fields["eos_token_id"][0]
    fields["rope_theta"] = float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)))
    fields["alpha"] = 1.0 if router == "token" else 0.1
    return MixtureOfRecursionsConfig(
        **{
            **fields,
            "num_recursions": recursions,
            "sharing": sharing,
            "router": router,
            "lora_rank": lora_rank,
            **overrides,
        }
    )
