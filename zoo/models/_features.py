"""An image model as a feature extractor. Imported when one is asked for: timm, whose record it uses, loads slowly."""

from timm.models import FeatureInfo
from torch import Tensor, nn

from zoo.models._backbone import Backbone


class FeatureNet(nn.Module):
    """``[B, in_chans, H, W]`` -> a list of maps ``[B, C, H / reduction, W / reduction]``, one for each level.

    What ``timm.create_model(..., features_only=True)`` returns, for a :class:`Backbone`: the stages after the last
    level and the head are dropped, and ``feature_info`` offers ``channels()``, ``reduction()`` and ``module_name()``.

    Args:
        model: The backbone; it becomes part of this module.
        out_indices: Levels in order, from 0.
    """

    def __init__(self, model: Backbone, out_indices: list[int]) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=True)
        self.feature_info = FeatureInfo(model.feature_info, tuple(out_indices))
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
