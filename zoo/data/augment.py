"""Training-time variation of pictures and batches: timm's transforms and mixing, set by a recipe."""

import dataclasses
from typing import TYPE_CHECKING

from torchvision.transforms import v2

from zoo.data.image import ToInput, Transform
from zoo.data.loader import Batch, seeded
from zoo.errors import RecipeError
from zoo.preprocessing import Preprocessing

if TYPE_CHECKING:
    from zoo.train.recipe import Augment


def train_transform(augment: "Augment", preprocessing: Preprocessing) -> Transform:
    """RGB picture -> ``[C, H, W]`` float32, randomly cropped, mirrored, recoloured and erased as the recipe says.

    For three channels it is timm's training transform; for others the picture turns grey before it is normalised.

    Raises:
        RecipeError: If ``augment.auto_augment`` is not in timm's notation.
    """
    from timm.data import create_transform
    from timm.data.random_erasing import RandomErasing

    mean = preprocessing.mean
    try:
        crop, recolour, _ = create_transform(
            input_size=(3, *preprocessing.img_size),
            is_training=True,
            separate=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm's default is wider than its type
            auto_augment=augment.auto_augment or None,
            interpolation=preprocessing.interpolation,
            mean=mean if len(mean) == 3 else mean[:1] * 3,  # the colour of what a rotation brings in
        )
    except (AssertionError, IndexError, KeyError, ValueError) as error:  # what timm's parser meets
        raise RecipeError(
            f"augment.auto_augment is {augment.auto_augment!r}; expected timm's notation, such as "
            "'rand-m9-mstd0.5-inc1', 'augmix-m3-w3' or 'original'."
        ) from error
    erase = [RandomErasing(augment.erasing, mode="pixel", device="cpu")] if augment.erasing else []
    return v2.Compose([crop, recolour, ToInput(preprocessing), *erase])


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
            inputs, targets = self.mixup(batch.inputs, batch.targets)
        return dataclasses.replace(batch, inputs=inputs, targets=targets)
