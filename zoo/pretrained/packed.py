"""Files of packed models: ternary weights at two bits each, and a header that says of which model they are.

Such a file is safetensors under the names of the packed model (:func:`zoo.layers.pack_bit_linears`), with ``model``,
``tag`` and ``config`` in its header as in every file of zoo's, and ``packing``; ``embeddings`` is "int8" where those
are rounded too. ``create_model`` takes it wherever it takes weights, and gives the packed model.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import zoo
from zoo.atomic import save_safetensors
from zoo.config import ModelConfig
from zoo.errors import WeightsError, nearest
from zoo.layers.bit_linear import BitLinear, PackedBitLinear, has_packed_layers, replace_bit_linears, replace_embeddings
from zoo.layers.embedding import Int8Embedding
from zoo.pretrained.files import read_header
from zoo.pretrained.load import is_pickle
from zoo.pretrained.source import overrides_of
from zoo.registry import config_of, get_config, split_name

PACKING = "bitnet-2bit"  # transformers' layout: rows r, r + R, r + 2R and r + 3R in a byte, lowest bits first


def save_packed(model: nn.Module, path: str | Path, name: str, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a packed model to a safetensors file, whole or not at all.

    Args:
        model: After :func:`zoo.layers.pack_bit_linears`.
        path: The file to write; replaced if it exists.
        name: The variant that it is, perhaps with a tag; where its config differs, the header says how.
        metadata: Strings to keep in the header besides, for example a licence.

    Raises:
        WeightsError: If the model is not packed, or the file cannot be written.
    """
    if not has_packed_layers(model):
        raise WeightsError(f"{type(model).__name__} is not packed; call zoo.layers.pack_bit_linears(model) first.")
    variant, tag = split_name(name)
    described = {
        "zoo_version": zoo.__version__,
        "model": variant,
        "tag": tag,
        "config": json.dumps(overrides_of(config_of(model), variant)),
        "packing": PACKING,
    }
    if any(isinstance(module, Int8Embedding) for module in model.modules()):
        described["embeddings"] = "int8"
    try:
        save_safetensors(model.state_dict(), path, {**described, **(metadata or {})})
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error.strerror or error}.") from error


def is_packed(path: str | Path) -> bool:
    """Whether a safetensors file is that of a packed model."""
    return "packing" in read_header(Path(path)).get("__metadata__", {})


def expect_packed(model: nn.Module, path: Path) -> bool:
    """Give a model on the meta device the layers of the packed file that it is about to be filled from.

    Returns:
        Whether the file is a packed one; if not, nothing is changed.

    Raises:
        WeightsError: If it is, and of another packing or config.
    """
    if is_pickle(path):
        return False  # it is refused where it would be read
    metadata = read_header(path).get("__metadata__", {})
    packing = metadata.get("packing")
    if packing is None:
        return False
    if packing != PACKING:
        raise WeightsError(f"{path}: packed as {packing!r}; expected {PACKING!r}.{nearest(packing, [PACKING])}")
    try:
        theirs = get_config(metadata["model"]).override(**json.loads(metadata.get("config", "{}")))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its header does not describe a model of zoo's: {error}") from error
    ours = config_of(model)
    if theirs != ours:
        raise WeightsError(
            f"{path}: packed weights of {metadata['model']}, which this model is not: {_unlike(theirs, ours)}."
        )

    def empty(layer: BitLinear) -> PackedBitLinear:
        with torch.device("meta"):
            return PackedBitLinear(layer.in_features, layer.out_features, eps=layer.norm.eps or 0.0)

    embeddings = metadata.get("embeddings")
    if embeddings not in (None, "int8"):
        raise WeightsError(f"{path}: embeddings as {embeddings!r}; expected 'int8', or nothing said of them.")
    replace_bit_linears(model, empty)
    if embeddings is not None:
        with torch.device("meta"):
            replace_embeddings(model, lambda layer: Int8Embedding(layer.num_embeddings, layer.embedding_dim))
    return True


def check_codes(model: nn.Module, path: Path) -> None:
    """Raise when a packed layer holds what is no weight.

    Raises:
        WeightsError: Names the first such layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, PackedBitLinear) and (layer.packed & layer.packed >> 1 & 0b01010101).any():
            raise WeightsError(f"{path}: {name}.packed holds a code that is none of -1, 0 and 1; the file is damaged.")


def _unlike(theirs: ModelConfig, ours: ModelConfig) -> str:
    if type(theirs) is not type(ours):
        return "it is of another family"
    pairs = ((name, value, getattr(ours, name)) for name, value in theirs.to_dict().items())
    return ", ".join(f"{name} is {own!r}, there {value!r}" for name, value, own in pairs if own != value)
