"""Backbones from stages: :func:`anynet` assembles the zoo's blocks by config alone.

    from zoo.builders import Stage, anynet

    config = anynet(
        [
            Stage("fused_mbconv", depth=2, width=32),
            Stage("mbconv", depth=4, width=64, kernel_size=5),
            Stage("modulation", depth=4, width=128, kernel_size=7),
        ],
        num_classes=10,
    )
    model = zoo.build(config)

The result is a config like any other: :func:`zoo.scale` scales it, ``config.to_json()`` keeps it, and as ``anynet``
with overrides (:func:`overrides`) it is trained by a recipe, saved, loaded, exported and pushed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ConfigError
from zoo.families.anynet import BLOCKS, AnyNetConfig
from zoo.pretrained.source import overrides_of

__all__ = ["BLOCKS", "AnyNetConfig", "Stage", "anynet", "overrides"]


@dataclass(frozen=True)
class Stage:
    """A row of like blocks, of which the first may change the width and halve the map."""

    block: str  # one of BLOCKS
    depth: int
    width: int
    stride: int = 2
    kernel_size: int = 3
    expand_ratio: float = 4.0
    group_size: int = 8


def anynet(stages: Sequence[Stage], *, stem_width: int | None = None, **fields: Any) -> AnyNetConfig:
    """A config from stages, after a stem of stride 2.

    Args:
        stages: In order.
        stem_width: Channels of the stem; half of the first stage's when None, to a multiple of 8.
        **fields: Other fields of :class:`AnyNetConfig`: ``img_size``, ``num_classes``, ``head_width``, ...

    Raises:
        ConfigError: If there is no stage, or the numbers do not make a network.
    """
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ConfigError(f"stages is {stages!r}; expected at least one zoo.builders.Stage.")
    return AnyNetConfig(
        stem_width=max(8, stages[0].width // 16 * 8) if stem_width is None else stem_width,
        blocks=tuple(stage.block for stage in stages),
        depths=tuple(stage.depth for stage in stages),
        widths=tuple(stage.width for stage in stages),
        strides=tuple(stage.stride for stage in stages),
        kernel_sizes=tuple(stage.kernel_size for stage in stages),
        expand_ratios=tuple(stage.expand_ratio for stage in stages),
        group_sizes=tuple(stage.group_size for stage in stages),
    ).override(**fields)


def overrides(config: AnyNetConfig) -> dict[str, Any]:
    """What a recipe's ``model.overrides``, or ``create_model("anynet", ...)``, needs for this config."""
    return overrides_of(config, "anynet")
