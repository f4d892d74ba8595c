"""Layers that two families or more share. Plain PyTorch: nothing here needs timm."""

from zoo.layers.alike import alike
from zoo.layers.attention_bias import AttentionBias, resize_bias_table
from zoo.layers.bit_linear import BitLinear, PackedBitLinear, pack_bit_linears
from zoo.layers.conv_norm import ConvNorm, NormLinear, fold_norm, fuse_batch_norm, fuse_pairs
from zoo.layers.drop import DropPath, drop_path_rates
from zoo.layers.layer_scale import LayerScale, LayerScale2d, fold_layer_scale
from zoo.layers.linear import TruncNormalLinear
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm2d
from zoo.layers.packed import (
    PackedConv2d,
    PackedLinear,
    fuse_activation,
    has_hooks,
    is_hooked,
    is_plain_inference,
    pack,
)
from zoo.layers.pool import GlobalPool
from zoo.layers.squeeze_excite import FusedSqueezeExcite, SqueezeExcite
from zoo.layers.stage import Stage

__all__ = [
    "AttentionBias",
    "BitLinear",
    "ConvNorm",
    "DropPath",
    "FusedSqueezeExcite",
    "GlobalPool",
    "LayerNorm2d",
    "LayerScale",
    "LayerScale2d",
    "Mlp",
    "NormLinear",
    "PackedBitLinear",
    "PackedConv2d",
    "PackedLinear",
    "SqueezeExcite",
    "Stage",
    "TruncNormalLinear",
    "alike",
    "drop_path_rates",
    "fold_layer_scale",
    "fold_norm",
    "fuse_activation",
    "fuse_batch_norm",
    "fuse_pairs",
    "has_hooks",
    "is_hooked",
    "is_plain_inference",
    "pack",
    "pack_bit_linears",
    "resize_bias_table",
]
