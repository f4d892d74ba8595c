"""Training-time variation of pictures and batches: timm's transforms and mixing, set by a recipe."""

from typing import TYPE_CHECKING

from zoo.data.image import Transform
from zoo.data.loader import Batch, seeded
from zoo.preprocessing import Preprocessing

if TYPE_CHECKING:
    from zoo.train.recipe import Augment


def train_transform(augment: "Augment", preprocessing: Preprocessing) -> Transform:
    """RGB picture -> ``[3, H, W]`` float32, randomly cropped, mirrored, recoloured and erased as the recipe says."""
    from timm.data import create_transform

    return create_transform(
        input_size=(3, *preprocessing.img_size),
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment or None,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augment.erasing,
        re_mode="pixel",
    )


class Mixing:
    """Mixup and CutMix of whole batches, drawn from (seed, step) alone. Turns labels into ``[B, num_classes]``."""

    def __init__(self, augment: "Augment", num_classes: int) -> None:
        from timm.data import Mixup

        self.mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            label_smoothing=augment.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: Batch, *seed: int) -> Batch:
        with seeded(*seed):
            return Batch(*self.mixup(batch.inputs, batch.targets))
