"""zoo's image models in timm's registry: everything that takes a timm model name then takes zoo's.

    import timm, zoo.integrations.timm
    zoo.integrations.timm.register()
    model = timm.create_model("zoo_efficientvit_m5.r224_in1k", pretrained=True, num_classes=10)

A model is offered as ``zoo_<name>``, even where timm has no such model today, so that no name of timm's is ever taken.
This module is to timm what its own model files are: ``register_model`` looks here for ``default_cfgs``, and adds to
``__all__``. Only timm's public names are used.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from torch import nn

from zoo import factory
from zoo.config import ImageConfig
from zoo.errors import ConfigError, nearest
from zoo.pretrained.convert import adapt_layout
from zoo.pretrained.manifest import list_weights
from zoo.pretrained.source import TIMM_PREFIX
from zoo.registry import family_name, get_config, get_family, index, list_models

__all__ = ["register"]

default_cfgs: dict[str, DefaultCfg] = {}  # timm's name -> its cfgs by tag, where timm's register_model looks for them


def register() -> list[str]:
    """Offer every image model of the zoo to timm; returns timm's names for them.

    Harmless to call again, which families registered since then need.

    Raises:
        ConfigError: If another package has registered one of these names with timm.
    """
    names = []
    for variant in list_models(task="image-classification"):
        name = TIMM_PREFIX + variant
        names.append(name)
        if not is_model(name):
            default_cfgs.update(generate_default_cfgs(_default_cfgs(variant)))
            globals()[name] = register_model(_entrypoint(variant))
        elif model_entrypoint(name).__module__ != __name__:
            raise ConfigError(f"timm has a model {name!r} already, from {model_entrypoint(name).__module__}.")
    return names


def _entrypoint(variant: str) -> Callable[..., nn.Module]:
    family = get_family(family_name(variant))

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        feature_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        levels = tuple(range(len(_reductions(variant))))
        features = {"out_indices": levels, "feature_cls": "getter", "flatten_sequential": True}
        return build_model_with_cfg(
            lambda **changes: _build(variant, **changes),
            TIMM_PREFIX + variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_filter_fn=lambda state_dict, model: adapt_layout(state_dict, family, model),
            feature_cfg={**features, **(feature_cfg or {})},
            # What a tag's weights need (their classes, their resolution) is a default that the caller may change.
            **{**_tag_config(variant, pretrained_cfg), **kwargs},
        )

    create.__name__ = create.__qualname__ = TIMM_PREFIX + variant
    create.__doc__ = f"{variant} of the zoo. Keyword arguments are the fields of its config, besides timm's own."
    return create


def _build(
    variant: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
) -> nn.Module:
    """What timm calls as the model class: ``variant`` with some config fields replaced.

    Raises:
        TypeError: For a keyword that is not a field of the config, as timm's own models raise it.
    """
    config = get_config(variant)
    names = [field.name for field in fields(config)]
    for name in changes:
        if name not in names:
            raise TypeError(
                f"{TIMM_PREFIX}{variant} got an unexpected keyword argument {name!r}.{nearest(name, names)}"
            )
    if isinstance(changes.get("img_size"), tuple | list):
        height, width = changes["img_size"]  # timm's way; zoo's configs hold one number for a square
        changes["img_size"] = height if height == width else (height, width)
    model = factory.build(config.override(**changes), device=device, dtype=dtype)
    for module in model.modules():
        if getattr(module, "fx_leaf", False):
            register_notrace_module(type(module))
    # On the meta device, zoo keeps buffers that are in no checkpoint real; timm expects every tensor where it asked.
    return model if device is None else model.to(device)


@cache
def _reductions(variant: str) -> tuple[int, ...]:
    """Stride of each feature level."""
    if variant in index():
        return tuple(index()[variant]["reductions"])
    model: Any = factory.build(get_config(variant), device="meta")
    return tuple(level["reduction"] for level in model.feature_info)


def _tag_config(variant: str, pretrained_cfg: Any) -> Mapping[str, Any]:
    """The config fields that the weights of the chosen tag need; without a choice, those of the default tag.

    ``pretrained_cfg`` is what ``timm.create_model`` passes on: a tag, a cfg as a dictionary or a record, or None.
    """
    tag: Any = pretrained_cfg or get_pretrained_cfg(TIMM_PREFIX + variant)
    if not isinstance(tag, str):
        tag = tag.get("tag") if isinstance(tag, Mapping) else tag.tag
    return next((weights.config for weights in list_weights(variant) if weights.tag == tag), {})


def _default_cfgs(variant: str) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """timm's description of the model under each of its tags, the default one first; without weights, under none."""
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name in [weights.name for weights in list_weights(variant)] or [variant]:
        config = get_config(name)
        assert isinstance(config, ImageConfig)
        cfgs[TIMM_PREFIX + name] = factory.pretrained_cfg(
            variant, factory.described_by(name), config, _reductions(variant)[-1]
        )
    return cfgs
