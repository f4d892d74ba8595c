"""Layers that two families or more share. Plain PyTorch: nothing here needs timm."""

from zoo.layers.attention_bias import AttentionBias, resize_bias_table
from zoo.layers.conv_norm import ConvNorm, NormLinear, fold_norm, fuse_batch_norm, fuse_pairs
from zoo.layers.drop import DropPath, drop_path_rates
from zoo.layers.pool import GlobalPool
from zoo.layers.squeeze_excite import SqueezeExcite, make_divisible

__all__ = [
    "AttentionBias",
    "ConvNorm",
    "DropPath",
    "GlobalPool",
    "NormLinear",
    "SqueezeExcite",
    "drop_path_rates",
    "fold_norm",
    "fuse_batch_norm",
    "fuse_pairs",
    "make_divisible",
    "resize_bias_table",
]
