"""Parameters, multiply-accumulates and activations, counted on the meta device: nothing is allocated, nothing runs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.analysis.shapes import OperatorCounter, learnable, shapes_only
from zoo.analysis.trace import by_module, trace
from zoo.config import ImageConfig, ModelConfig, TextConfig
from zoo.errors import ConfigError
from zoo.families import MODULES
from zoo.registry import Family, family_of, get_config, get_family, natural_key

INDEX = Path(__file__).parents[1] / "models" / "index.json"


@dataclass(frozen=True)
class Counts:
    """What one forward pass of one sample costs; of a language model, one token of a sequence of full length."""

    params: int  # learnable
    macs: int  # multiply-accumulates of convolutions, linear layers, matrix products and scans
    activations: int  # elements that those operators write


def count(config: ModelConfig | str, *, img_size: int | tuple[int, int] | None = None) -> Counts:
    """Count one forward pass in eval mode, batch 1.

    Only convolutions, linear layers and matrix products (those of attention included) are counted, as papers do and as
    fvcore and timm do for activations, and selective scans, as Mamba's vision papers do: 9 multiply-accumulates for
    each state and step, 1 for the skip. Norms, activation functions, softmax, pooling and additions are not.

    Args:
        config: A config, or the name of a model.
        img_size: Input in pixels, a side or (height, width), in place of the config's own.

    Raises:
        ConfigError: If the config is neither an image nor a language model's, or ``img_size`` is given for the latter.
    """
    if isinstance(config, str):
        config = get_config(config)
    if isinstance(config, TextConfig) and img_size is None:
        return _count_token(config)
    if not isinstance(config, ImageConfig):
        raise ConfigError(f"{type(config).__name__} is no image model's config; it has no size in pixels.")
    if img_size is not None:
        config = config.override(img_size=img_size)
    with shapes_only() as shapes:
        model = family_of(config).model(config.override(drop_path_rate=0.0))  # so that more blocks are alike
        model.eval()
        model(torch.empty(1, config.in_chans, *config.input_hw))
    return Counts(learnable(model), shapes.macs, shapes.activations)


def _count_token(config: TextConfig) -> Counts:
    """Costs of a token in a sequence of ``max_position_embeddings``, their sum divided by its length."""
    tokens = config.max_position_embeddings
    lm: Any = family_of(config).model
    with shapes_only() as shapes:
        trunk = lm.trunk(config)  # without transformers, which takes a second to import
        head = trunk.make_head()
        trunk.eval()
        head(trunk(torch.empty(1, tokens, config.hidden_size)).hidden)
    params = learnable(trunk) + (0 if config.tie_word_embeddings else learnable(head))
    return Counts(params, round(shapes.macs / tokens), round(shapes.activations / tokens))


def count_forward(model: nn.Module, *inputs: Tensor) -> Counts:
    """Count what ``model(*inputs)`` costs in eval mode, on whichever device both are; the model's mode is kept."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: there, linear and matmul arrive whole instead of as the operators they are made of.
        # Attention arrives as two matrix products: torch has no formula for some of the kernels that fuse them.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), OperatorCounter() as counter:
            model(*inputs)
    finally:
        model.train(training)
    params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Counts(params=params, macs=counter.macs, activations=counter.activations)


@dataclass(frozen=True)
class ModuleCounts(Counts):
    """What one module costs, with all inside it; of a language model, for a whole sequence."""

    weight_bytes: int  # of parameters and buffers, in the dtype asked for; integers as they are
    activation_bytes: int  # of ``activations``
    moved_bytes: int  # that all operators, norms and additions too, read and write, each tensor once an operator


def count_modules(
    config: ModelConfig | str,
    *,
    dtype: torch.dtype = torch.float32,
    img_size: int | tuple[int, int] | None = None,
    tokens: int | None = None,
) -> dict[str, ModuleCounts]:
    """Count one forward pass, batch 1, module by module, on the meta device.

    Args:
        config: A config, or the name of a model.
        dtype: What bytes are counted for.
        img_size: Of an image model, in place of the config's own.
        tokens: Of a language model's sequence; ``max_position_embeddings`` by default.

    Returns:
        Costs by module path, each with all inside it, in the order of ``named_modules()``; ``""`` is the whole.

    Raises:
        ConfigError: If ``img_size`` is given for a language model, or ``tokens`` for an image model.
    """
    config = get_config(config) if isinstance(config, str) else config
    if isinstance(config, ImageConfig) and tokens is None:
        config = config if img_size is None else config.override(img_size=img_size)
        inputs = torch.empty(1, config.in_chans, *config.input_hw, device="meta")
    elif isinstance(config, TextConfig) and img_size is None:
        inputs = torch.empty(1, tokens or config.max_position_embeddings, dtype=torch.int64, device="meta")
    else:
        raise ConfigError(f"{type(config).__name__} takes no {'img_size' if tokens is None else 'tokens'}.")
    with torch.device("meta"):
        model = family_of(config).model(config)
    groups = by_module(trace(model, inputs))
    counts = {}
    for path, module in model.named_modules():
        own = groups.get(path, [])
        results = sum(operator.results for operator in own)
        held: list[Tensor] = [*module.parameters(), *module.buffers()]
        sizes = (x.numel() * (dtype.itemsize if x.is_floating_point() else x.element_size()) for x in held)
        counts[path] = ModuleCounts(
            params=sum(parameter.numel() for parameter in module.parameters()),
            macs=sum(operator.macs for operator in own),
            activations=results,
            weight_bytes=sum(sizes),
            activation_bytes=results * dtype.itemsize,
            moved_bytes=sum(operator.elements for operator in own) * dtype.itemsize,
        )
    return counts


def build_index() -> dict[str, dict[str, Any]]:
    """Every built-in variant with its family, task, size of input, strides of levels and costs, in natural order."""
    entries = {}
    for name in MODULES:
        family = get_family(name)
        for variant, make_config in family.variants.items():
            config: Any = make_config()
            entries[variant] = {
                "family": family.name,
                "task": family.task,
                **_input_size(family, config),
                **asdict(count(config)),
            }
    return {variant: entries[variant] for variant in sorted(entries, key=natural_key)}


def _input_size(family: Family, config: Any) -> dict[str, Any]:
    """How large an input is, and of pictures what the feature levels make of it."""
    if isinstance(config, TextConfig):
        return {"seq_len": config.max_position_embeddings}
    with torch.device("meta"):
        model: Any = family.model(config)
    return {"img_size": config.img_size, "reductions": [level["reduction"] for level in model.feature_info]}


def index_text() -> str:
    """:func:`build_index` as ``models/index.json`` holds it: one variant a line, as a diff shows best."""
    lines = [f"  {json.dumps(variant)}: {json.dumps(entry)}" for variant, entry in build_index().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
