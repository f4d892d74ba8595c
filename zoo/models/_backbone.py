"""The timm-facing half of every image model: features, head, classifier, checkpointing, fusing.

A family's model sets up its stem, ``stages`` and head and calls :meth:`Backbone.finish`; everything that timm's users
expect of a model (``timm/tests/test_models.py`` is the contract) is here, once.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from zoo.config import ImageConfig
from zoo.errors import ConfigError, ShapeError
from zoo.layers import GlobalPool, fuse_batch_norm, pack
from zoo.layers.init import reset_parameters


class Backbone(nn.Module):
    """Base of the image models: ``[B, in_chans, H, W]`` float -> logits ``[B, num_classes]``.

    Subclasses provide ``stages`` (an ``nn.Sequential``, each member a feature level unless :meth:`finish` is told
    otherwise), :meth:`forward_stem`, :meth:`make_head` and, where there is something between the last stage and the
    pooling, a ``norm`` or :meth:`forward_final`. A family whose published parameter names call the stages or the head
    something else says so in ``stages_name`` and ``head_name``, and overrides :meth:`forward_stages` and
    :meth:`classify`, since TorchScript finds modules by literal name only.

    Attributes:
        config: The config this was built from.
        num_classes: Classes of the current classifier, 0 for none.
        min_input_side: The fewest pixels a side that the network can stride down.
        num_features: Channels of ``forward_features``.
        head_hidden_size: Width of ``forward_head(..., pre_logits=True)``.
        feature_info: Per level, a dict with ``num_chs``, ``reduction`` (stride) and ``module``.
        pretrained_cfg, default_cfg: timm's description of input and head; ``create_model`` fills it in.
    """

    stages_name = "stages"
    head_name = "head"
    fused_memory_format: torch.memory_format | None = None  # what suits the weights after fuse(); None: as they are

    if TYPE_CHECKING:  # TorchScript reads annotations at run time, and knows no module as a type
        stages: nn.Sequential
        head: nn.Module
        norm: nn.Module

    def finish(
        self,
        config: ImageConfig,
        *,
        widths: tuple[int, ...],
        reductions: tuple[int, ...],
        num_features: int | None = None,
        head_hidden_size: int | None = None,
    ) -> None:
        """Set the attributes above and build the pooling and the head. Call last in ``__init__``.

        Args:
            config: The config.
            widths, reductions: Channels and stride of each feature level.
            num_features: Channels of ``forward_features`` where they are not the last level's.
            head_hidden_size: Channels that the classifier sees where they are not those.
        """
        self.config = config
        self.in_chans = config.in_chans
        self.min_input_side = config.min_input_side
        self.num_classes = config.num_classes
        self.drop_rate = config.drop_rate
        self.grad_checkpointing = False
        self.taps = tuple(range(len(widths))) if config.taps is None else config.taps
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"{self.stages_name}.{stage}"}
            for stage, width, reduction in zip(self.taps, widths, reductions, strict=True)
        ]
        self.num_features = widths[-1] if num_features is None else num_features
        self.head_hidden_size = self.num_features if head_hidden_size is None else head_hidden_size
        if not hasattr(self, "norm"):
            self.norm = nn.Identity()
        self.global_pool = GlobalPool(config.global_pool)
        setattr(self, self.head_name, self.make_head(config.num_classes))
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg = self.pretrained_cfg

    # What a family provides.

    def forward_stem(self, x: Tensor) -> Tensor:
        """Pixels ``[B, in_chans, H, W]`` to the input of the first stage."""
        raise NotImplementedError

    def forward_stages(self, x: Tensor) -> Tensor:
        """All stages, one after the other."""
        return self.stages(x)

    def forward_final(self, x: Tensor) -> Tensor:
        """Everything between the last stage and pooling; by default that is the norm."""
        return self.norm(x)

    def classify(self, x: Tensor) -> Tensor:
        """Pooled features to logits."""
        return self.head(x)

    def make_head(self, num_classes: int) -> nn.Module:
        """A fresh classifier on ``num_features`` channels; the identity for 0 classes."""
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    # The forward pass.

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features ``[B, num_features, H / stride, W / stride]``."""
        if not torch.jit.is_scripting():
            self.check_images(x)
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in getattr(self, self.stages_name):
                x = recomputed(stage, x)
        else:
            x = self.forward_stages(x)
        return self.forward_final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits ``[B, num_classes]``, or to pooled features ``[B, head_hidden_size]``."""
        x = self.global_pool(x)
        return x if pre_logits else self.classify(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen stages, as in timm.

        Args:
            x: Images ``[B, in_chans, H, W]``.
            indices: The last n levels, a list of levels (negative from the end), or None for all.
            norm: Apply the final norm to the last level, where the family has one.
            stop_early: Leave out the stages after the last chosen level.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return just the list.

        Returns:
            ``(final features, [levels])``, or the list alone.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt is {output_fmt!r}; expected 'NCHW'.")
        chosen = [self.taps[level] for level in take_indices(len(self.feature_info), indices)]
        stages = getattr(self, self.stages_name)
        last = len(stages) - 1
        intermediates: list[Tensor] = []
        self.check_images(x)
        x = self.forward_stem(x)
        for i, stage in enumerate(stages):
            if stop_early and i > max(chosen):
                return intermediates if intermediates_only else (x, intermediates)
            x = recomputed(stage, x) if self.grad_checkpointing else stage(x)
            if i in chosen:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return self.forward_final(x), intermediates

    @torch.jit.unused
    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images, or has fewer pixels than the network can stride down.

        Programs that are traced, exported or compiled do not check: they would hold the check as a condition.

        Raises:
            ShapeError: With what was expected.
        """
        shape = x.shape
        if type(shape) is not torch.Size or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return  # the first is FX's
        side = self.min_input_side
        if len(shape) != 4 or shape[1] != self.in_chans or shape[2] < side or shape[3] < side:
            raise ShapeError(
                f"Images are {list(shape)}; expected [batch, {self.in_chans}, height, width], "
                f"with at least {side} pixels on each side."
            )

    # Changing a built model.

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages and the head that the chosen levels do not need; returns the levels kept, from 0."""
        chosen = take_indices(len(self.feature_info), indices)
        stages = getattr(self, self.stages_name)
        kept = self.taps[max(chosen)] + 1
        shortened = kept < len(stages)
        self.min_input_side = min(self.min_input_side, self.feature_info[max(chosen)]["reduction"])
        setattr(self, self.stages_name, stages[:kept])
        if prune_norm or shortened:
            self.prune_norm()
            self.num_features = self.head_hidden_size = self.feature_info[max(chosen)]["num_chs"]
        if prune_head or shortened:
            self.prune_head()
        return chosen

    def prune_norm(self) -> None:
        """Remove what :meth:`forward_final` applies."""
        self.norm = nn.Identity()

    def prune_head(self) -> None:
        """Remove everything after the last feature map: the pooling and the classifier by default."""
        self.reset_classifier(0, "")

    def get_classifier(self) -> nn.Module:
        """The linear layer that makes the logits (the identity when there is none)."""
        head = getattr(self, self.head_name)
        return getattr(head, "linear", head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a freshly initialised classifier in place, on the same device and in the same dtype.

        Args:
            num_classes: 0 for none.
            global_pool: ``"avg"``, ``"max"`` or ``""``; None keeps the current one, except that a classifier on
                features that are not pooled brings ``"avg"`` back.
        """
        if global_pool is None and num_classes and not self.config.global_pool:
            global_pool = "avg"
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changes["global_pool"] = global_pool
        self.config = self.config.override(**changes)  # raises for a combination that makes no sense
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        head = self.make_head(num_classes).to(parameter.device, parameter.dtype).train(self.training)
        setattr(self, self.head_name, head)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers in order, for layer-wise learning rates."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones."""
        return set()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one built for this size, its position-dependent tables resampled."""
        self.config = self.config.override(img_size=img_size)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every parameter and buffer in place, for a model built on the meta device and ``to_empty``."""
        reset_parameters(self)

    @torch.jit.ignore
    def fuse(self) -> "Backbone":
        """Fold every batch norm into its convolution or linear layer, in place and for good; for inference only.

        The folded weights are formed in float64 and rounded once, so outputs agree to float32 rounding. Training mode
        is switched off: a folded batch norm has no batch statistics. On a CPU, what is left of the convolutions keeps
        its weights as oneDNN wants them, which takes their memory twice (:class:`~zoo.layers.PackedConv2d`). In most
        families the weights also become channels-last, in which depthwise convolutions, pooling and upsampling are
        faster; that spreads from the stem, whatever the input's format is.
        """
        self.eval()
        fuse_batch_norm(self)
        self.fuse_ends()
        pack(self)
        return self if self.fused_memory_format is None else self.to(memory_format=self.fused_memory_format)

    @torch.jit.ignore
    def fuse_ends(self) -> None:
        """Fuse, in place, what the model keeps outside its submodules; nothing by default."""


def recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    """A stage whose activations are computed again in the backward pass; its batch norms count a batch once."""
    if torch.compiler.is_compiling():  # which takes no contexts, and repeats no update
        return checkpoint(stage, x, use_reentrant=False)
    return checkpoint(stage, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _uncounted(stage)))


@contextmanager
def _uncounted(stage: nn.Module) -> Iterator[None]:
    """Batch norms normalise as they did, and leave what they know of earlier batches alone."""
    norms: list[Any] = [m for m in stage.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    counted = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:  # a part of 0 of the batch is added; without statistics, other tensors would be saved
            norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, count) in zip(norms, counted, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def take_indices(count: int, indices: int | Collection[int] | None) -> list[int]:
    """Feature levels to take out of ``count``: the last n for an int, all for None, negative ones from the end.

    Raises:
        ConfigError: If that is neither, or a level is out of range or named twice.
    """
    if indices is None:
        return list(range(count))
    if _is_whole(indices):
        if not 0 < indices <= count:
            raise ConfigError(
                f"out_indices={indices} asks for the last {indices} levels; expected 1 to {count}, "
                f"nearest {min(max(indices, 1), count)}."
            )
        return list(range(count - indices, count))
    if (
        isinstance(indices, str)
        or not isinstance(indices, Collection)
        or not indices
        or not all(map(_is_whole, indices))
    ):
        raise ConfigError(
            f"out_indices is {indices!r}; expected how many of the last levels, or a list of levels from "
            f"{-count} to {count - 1}."
        )
    for index in indices:
        if not -count <= index < count:
            raise ConfigError(
                f"out_indices has {index}; expected {-count} to {count - 1} ({count} feature levels), "
                f"nearest {min(max(index, -count), count - 1)}."
            )
    chosen = [index % count for index in indices]
    for level in chosen:
        if chosen.count(level) > 1:
            raise ConfigError(f"out_indices is {indices!r}, which names level {level} twice; expected each level once.")
    return chosen


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
