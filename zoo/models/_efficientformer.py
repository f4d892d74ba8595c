"""What the two EfficientFormers share: a pair of classifiers, and attention over the whole map at any size."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.config import ImageConfig
from zoo.layers import AttentionBias, TruncNormalLinear
from zoo.models._backbone import Backbone


class MapAttention(AttentionBias):
    """Base of the attention modules, which attend over a whole map of any size."""

    fx_leaf = True  # FX cannot trace a branch on the map's size: zoo.integrations.timm makes this a leaf of its graphs

    reduction: int  # pixels of the image, a side, to one position of the map

    def reset_parameters(self) -> None:
        """Set the attention biases to zero and rebuild their index."""
        self.reset_attention_bias()

    def fuse(self) -> nn.Module:
        """Keep the gathered attention bias, as nothing will train it any more."""
        self.freeze_attention_bias()
        return self


class EfficientFormerBase(Backbone):
    """Backbone with two linear classifiers: ``head`` learns the label, ``head_dist`` what a teacher says (DeiT's way).

    Their mean is the output; in training, :meth:`set_distilled_training` asks for the pair.
    """

    fused_memory_format = torch.channels_last

    if TYPE_CHECKING:
        head_dist: nn.Module | None  # None when there is no classifier, and after fuse(), which merges the two

    def finish(self, config: ImageConfig, **features: Any) -> None:
        super().finish(config, **features)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head_dist = self.make_head(config.num_classes) if config.num_classes else None
        self.distilled_training = False

    def make_head(self, num_classes: int) -> nn.Module:
        return TruncNormalLinear(self.num_features, num_classes) if num_classes else nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        """Pooled features to logits; to a pair in training, where :meth:`set_distilled_training` asked for it."""
        x = self.head_drop(x)
        if self.head_dist is None:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            pair: Any = (logits, logits_dist)  # not in the annotations: TorchScript takes one type only
            return pair
        return (logits + logits_dist) / 2

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both logits in training, for a loss that compares the second with a teacher's, instead of the mean."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """Both linear layers; the identity without a classifier; the one that is left after :meth:`fuse`."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = None
        if num_classes:
            parameter = next(self.parameters())
            head = self.make_head(num_classes).to(parameter.device, parameter.dtype)
            self.head_dist = head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        super().set_input_size(img_size)
        for module in self.modules():
            if isinstance(module, MapAttention):
                module.resize_attention_bias(self.config.map_hw(module.reduction))

    @torch.jit.ignore
    def fuse_ends(self) -> None:
        """Make one classifier of two."""
        if self.head_dist is not None:
            self.head, self.head_dist = _mean(self.head, self.head_dist), None

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)"
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if "attention_biases" in name}


@torch.no_grad()
def _mean(first: Any, second: Any) -> nn.Linear:
    """The linear layer whose output is the mean of two others'."""
    mean = nn.Linear(first.in_features, first.out_features, device=first.weight.device, dtype=first.weight.dtype)
    mean.weight.copy_((first.weight.double() + second.weight.double()) / 2)
    mean.bias.copy_((first.bias.double() + second.bias.double()) / 2)
    return mean.train(first.training)


@torch.no_grad()
def side_by_side(*convs: Any) -> nn.Conv2d:
    """The 1x1 convolution that does what several on one input do, their outputs side by side."""
    weight = torch.cat([conv.weight for conv in convs])
    merged = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
    assert merged.bias is not None
    merged.weight.copy_(weight)
    merged.bias.copy_(torch.cat([conv.bias for conv in convs]))
    return merged.train(convs[0].training)
