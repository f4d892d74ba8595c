"""From a config or a name to a model: built, filled with weights, and described."""

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.config import ImageConfig, ModelConfig
from zoo.errors import ConfigError, nearest, reason
from zoo.layers.init import skip_init
from zoo.preprocessing import Preprocessing
from zoo.pretrained.convert import adapt_layout
from zoo.pretrained.fetch import fetch
from zoo.pretrained.load import fit_state_dict, load_state_dict, walk
from zoo.pretrained.manifest import Weights, get_weights, list_weights
from zoo.pretrained.packed import check_codes, expect_packed
from zoo.pretrained.source import find_weights, is_source, weights_file
from zoo.registry import family_name, family_of, get_config, get_family, split_name

_logger = logging.getLogger(__name__)


def build(
    config: ModelConfig, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A freshly initialised model, in training mode.

    Args:
        config: The config of a registered family.
        device: Where to build it, ``"meta"`` for shapes without memory; None for PyTorch's default device.
        dtype: Of its floating point parameters and buffers; None for PyTorch's default dtype.

    Raises:
        ConfigError: If the config belongs to no registered family, or device or dtype are not what they should be.

    Example:
        >>> config = zoo.get_config("efficientvit_m0").override(depths=(1, 1, 1))
        >>> model = zoo.build(config)
    """
    family = family_of(config)
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}; expected a floating point torch.dtype, such as torch.bfloat16.")
    with nullcontext() if device is None else torch.device(device):
        model = family.model(config)
    return model if dtype in (None, torch.get_default_dtype()) else model.to(dtype=dtype)


def check_device(device: str | torch.device | None) -> None:
    """Raise ConfigError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        there = "'cpu'"
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            last = torch.accelerator.device_count() - 1
            there += f" or '{accelerator.type}:0'" + (f" to '{accelerator.type}:{last}'" if last else "")
        why = reason(error).partition(". ")[0]
        if why.startswith("Expected one of"):  # every kind of device that PyTorch has heard of
            why = "PyTorch knows no such device"
        raise ConfigError(f"Device {str(device)!r} cannot be used here: {why}; expected {there}.") from error


def create_model(
    name: str,
    pretrained: bool | None = None,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> nn.Module:
    """A model by name, in training mode, with random or trained weights.

    An image model maps ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``; its ``pretrained_cfg`` (also
    ``default_cfg``) describes input and classifier in timm's words.

    Args:
        name: A variant (``"efficientvit_m5"``), or with a tag of its weights (``"efficientvit_m5.r224_in1k"``), whose
            config then applies even without loading them. Or a place where weights lie with their description:
            ``"hf-hub:owner/name"``, ``"hf-hub:owner/name@revision"``, ``"local-dir:FOLDER"``, ``"FILE.safetensors"``,
            ``"https://host/FILE.safetensors#sha256=..."``.
        pretrained: Load the weights of the tag, or the model's default ones; fetched from the Hub where need be. None
            is False for a variant or tag, and True for a place.
        checkpoint: Load this safetensors file instead, under zoo's, timm's or the authors' parameter names. It may lie
            in any of the places above.
        num_classes: Classes of the classifier, 0 for none: pooled features ``[B, C]``. Where it differs from the
            file's, the classifier is initialised anew, with a warning in the log.
        in_chans: Channels of the input; where it differs from the file's, the first convolution is adapted.
        img_size: Side, or (height, width), in pixels that the model is built for; weights are resampled to fit.
        features_only: Return a network that gives a list of feature maps, with ``feature_info`` as in timm.
        out_indices: With ``features_only``: the last n levels, or a list of levels; None for all.
        drop_path_rate: Stochastic depth of the last block.
        device: Where the model is to be; None for PyTorch's default device.
        dtype: Of its floating point parameters and buffers; None for PyTorch's default dtype.
        **overrides: Any other fields of the config. Those that are None keep the variant's value.

    Raises:
        UnknownModelError: If there is no such model.
        ConfigError: If an override is not a field of the config, or its value does not fit; if options contradict.
        WeightsError: If the weights are not known, cannot be had, are damaged, or do not fit the model.

    Examples:
        >>> model = zoo.create_model("efficientvit_m0", pretrained=True, num_classes=37, drop_path_rate=0.1)
        >>> backbone = zoo.create_model("efficientvit_m0", pretrained=True, features_only=True, out_indices=(1, 2))
        >>> model = zoo.create_model("efficientvit_m0", checkpoint="finetuned.safetensors", num_classes=37)
    """
    check_device(device)
    outside = is_source(name)
    if pretrained is None:
        pretrained = outside and checkpoint is None
    if pretrained and checkpoint is not None:
        raise ConfigError("Both pretrained=True and checkpoint are given; expected one source of weights.")
    if out_indices is not None and not features_only:
        raise ConfigError("out_indices chooses feature levels; it needs features_only=True.")
    if features_only and num_classes is not None:
        _logger.warning("num_classes=%d has no effect with features_only=True", num_classes)

    weights = find_weights(name) if outside or pretrained else None
    config = weights.model_config if weights else get_config(name)
    variant = weights.model if weights else split_name(name)[0]
    overrides |= {"num_classes": num_classes, "img_size": img_size, "drop_path_rate": drop_path_rate}
    if in_chans != 3:  # the default leaves weights for other inputs as they are
        overrides["in_chans"] = in_chans
    if features_only:
        if not isinstance(config, ImageConfig):
            raise ConfigError(f"features_only=True is for image models; {variant} reads text: expected False.")
        overrides |= {"num_classes": 0, "global_pool": ""}
    changes = {field: value for field, value in overrides.items() if value is not None}
    names = [spec.name for spec in dataclasses.fields(config)]
    for option in changes.keys() - names:  # here, since override() knows of no options but fields
        known = {*inspect.signature(create_model).parameters, *names} - {option}
        near = nearest(option, sorted(known))
        raise ConfigError(f"{type(config).__name__} has no field {option!r}.{near}")
    config = config.override(**changes)
    if features_only and isinstance(config, ImageConfig) and config.taps is not None:
        _feature_levels(len(config.taps), out_indices)  # refused before anything is built

    source = None
    if checkpoint is not None:
        source = weights_file(checkpoint)
    elif pretrained and weights is not None:
        source = fetch(weights)
    model: Any = build(config, device=device, dtype=dtype) if source is None else _empty(config, dtype)
    if isinstance(config, ImageConfig):
        described = weights or described_by(name)
        reduction = model.feature_info[-1]["reduction"]
        model.pretrained_cfg = model.default_cfg = pretrained_cfg(variant, described, config, reduction)
    if source is not None:
        # A user may write to a file of their own while the model is in use; nobody writes to one of a cache.
        kept = checkpoint is None and weights is not None and bool(weights.hub or weights.url or not outside)
        _fill(model, source, variant, device, mapped=kept)
    return _feature_net(model, _feature_levels(len(model.feature_info), out_indices)) if features_only else model


def _empty(config: ModelConfig, dtype: torch.dtype | None) -> nn.Module:
    """A model whose tensors are about to be replaced: nothing is initialised only to be overwritten.

    An image model's memory is reserved and never touched, which takes a fifth less time than the meta device does. What
    would touch it, such as a conversion, is done on the meta device.
    """
    untouched = isinstance(config, ImageConfig) and dtype in (None, torch.get_default_dtype())
    with skip_init():
        return build(config, device=None if untouched else "meta", dtype=dtype)


def _fill(model: nn.Module, path: Path, variant: str, device: str | torch.device | None, *, mapped: bool) -> None:
    """Give a model of :func:`_empty` the tensors of a file."""
    device = torch.device(device if device is not None else torch.get_default_device())
    if device.type == "meta":
        raise ConfigError("device is 'meta', which holds no values; expected a real device to load weights.")
    family = get_family(family_name(variant))
    state = load_state_dict(path, device, mapped=mapped)
    packed = any(name.endswith(".packed") for name in state) and expect_packed(model, path)
    fit_state_dict(model, adapt_layout(state, family, model), family, assign=True)
    if packed:
        check_codes(model, path)
    if device.type != "cpu":
        model.to(device)  # the buffers that are in no file, which are made on the CPU
    stranded = [
        prefix + name
        for prefix, module in walk(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    assert not stranded, f"{family.name} must create {stranded} on the CPU when it is built on the meta device"


def _feature_levels(count: int, out_indices: int | Sequence[int] | None) -> list[int]:
    """The feature levels asked for, out of ``count``, in order, from 0."""
    from zoo.models._backbone import take_indices

    return sorted(take_indices(count, out_indices))


def _feature_net(model: Any, levels: list[int]) -> nn.Module:
    from zoo.models._features import FeatureNet

    net: Any = FeatureNet(model, levels)
    head = ("num_classes", "classifier", "label_names")
    net.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in head}
    net.default_cfg = net.pretrained_cfg
    return net


def described_by(name: str) -> Weights | None:
    """The weights whose preprocessing and classes describe a model: of its tag, else its default ones, if any."""
    variant, tag = split_name(name)
    return get_weights(name) if tag else next(iter(list_weights(variant)), None)


def pretrained_cfg(variant: str, weights: Weights | None, config: ImageConfig, reduction: int) -> dict[str, Any]:
    """timm's description of a model: what goes in, how pictures become that, and what the classifier says.

    Args:
        variant: The model.
        weights: The weights that describe it, loaded or not; None when there are none.
        config: The config it was built from.
        reduction: Stride of the model's last feature level, which tells the size of the map that is pooled.

    Returns:
        What ``timm.models.PretrainedCfg(...).to_dict()`` returns for it.
    """
    family = get_family(family_name(variant))
    preprocessing, classes = Preprocessing(img_size=config.input_hw), config.num_classes
    described: dict[str, Any] = {"architecture": variant}
    if weights is not None:
        described |= {"tag": weights.tag, "license": weights.licence, **_source(weights)}
        trained = weights.model_config
        assert isinstance(trained, ImageConfig)
        preprocessing = weights.preprocessing
        if config.input_hw != trained.input_hw:
            preprocessing = dataclasses.replace(preprocessing, img_size=config.input_hw)
        if weights.label_names is not None and classes == trained.num_classes:
            described["label_names"] = weights.label_names
    height, width = preprocessing.img_size
    return {
        **described,
        "custom_load": False,
        "input_size": (config.in_chans, height, width),
        "fixed_input_size": False,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
        "mean": _per_channel(preprocessing.mean, config.in_chans),
        "std": _per_channel(preprocessing.std, config.in_chans),
        "num_classes": classes,
        "pool_size": (-(-height // reduction), -(-width // reduction)),
        "first_conv": family.first_conv,
        "classifier": family.classifiers[0] if len(family.classifiers) == 1 else family.classifiers,
        "paper_ids": family.paper,
        "origin_url": f"https://{family.code.split()[0]}",
    }


def _source(weights: Weights) -> dict[str, Any]:
    if weights.pickled:
        return {}  # converted once before it is loaded, which timm cannot know
    if weights.url:
        return {"url": weights.url}
    if weights.packaged:
        return {"file": str(weights.path)}
    return {"hf_hub_id": f"{weights.hub}@{weights.revision}", "hf_hub_filename": weights.file}


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or deviations for another number of channels: their average, for each."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
