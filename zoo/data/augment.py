"""Training-time variation of pictures and batches: timm's transforms and mixing, set by a recipe."""

import dataclasses
import math
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from zoo.data.image import Box, Patch, decode_crop
from zoo.data.loader import Batch, seeded
from zoo.data.shift import move_columns, move_rows
from zoo.errors import RecipeError
from zoo.preprocessing import Preprocessing

if TYPE_CHECKING:
    from zoo.train.recipe import Augment


class TrainTransform:
    """From a picture's file to ``[3, H, W]`` uint8, randomly cropped, mirrored and recoloured, and perhaps erased.

    The random numbers are drawn in timm's order, and what recolours is timm's; cropping, resizing, mirroring, shearing
    and shifting give what timm gives up to rounding, by faster kernels.

    Args:
        augment: What to vary.
        preprocessing: The size, the interpolation, and the colour of what a rotation brings in.
        size_at: From the epoch to another (height, width) in pixels, none larger; by default they are all the same.

    Raises:
        RecipeError: If ``augment.auto_augment`` is not in timm's notation.
    """

    def __init__(
        self,
        augment: "Augment",
        preprocessing: Preprocessing,
        size_at: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.augment = augment
        self.preprocessing = preprocessing
        self.size_at = size_at
        self.largest = preprocessing.img_size
        self.interpolation = augment.interpolation or preprocessing.interpolation
        self.channels = len(preprocessing.mean)
        self.recolour = _recolour(augment, preprocessing)

    def load(self, data: bytes, name: str, epoch: int) -> tuple[Tensor, Patch | None]:
        size = self.size_at(epoch) if self.size_at is not None else self.preprocessing.img_size
        pixels = decode_crop(data, name, self._crop, size)
        interpolation = self.interpolation
        if interpolation == "random":  # drawn here, where timm draws it
            interpolation = random.choice(("bilinear", "bicubic"))
        pixels = _resized(pixels, size, interpolation)
        if self.augment.hflip and torch.rand(1) < self.augment.hflip:
            pixels = pixels.flip(-1)
        if self.recolour is not None:
            image = self.recolour(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
            pixels = _pixels(image)
        return pixels, self._erase(size)

    def _crop(self, height: int, width: int) -> Box:
        """A part whose area and proportions are random; after ten that do not fit, the middle."""
        (smallest, largest), (narrow, wide) = self.augment.scale, self.augment.ratio
        for _ in range(10):
            area = random.uniform(smallest, largest) * height * width
            ratio = math.exp(random.uniform(math.log(narrow), math.log(wide)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(random.randint(0, height - h), random.randint(0, width - w), h, w)
        w, h = min(width, round(height * wide)), min(height, round(width / narrow))
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def _erase(self, size: tuple[int, int]) -> Patch | None:
        """Noise for a random rectangle, as arXiv:1708.04896 has it, with timm's bounds."""
        if not self.augment.erasing or random.random() > self.augment.erasing:
            return None
        height, width = size
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                return Patch(top, left, torch.randn(self.channels, h, w))
        return None


def _resized(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if pixels.shape[1:] == size:
        return pixels
    if interpolation == "nearest":
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return _pixels(image.resize(size[::-1], Image.Resampling.NEAREST))
    # torch's kernel for bytes is fastest on whole pixels side by side.
    whole = pixels[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(whole, list(size), mode=interpolation, antialias=True)[0]


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _recolour(augment: "Augment", preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image] | None:
    """timm's colour jitter or policy; None if there is neither."""
    from timm.data import create_transform

    if not augment.auto_augment and not augment.color_jitter:
        return None
    mean = preprocessing.mean
    try:
        _, recolour, _ = create_transform(
            input_size=(3, *preprocessing.img_size),
            is_training=True,
            separate=True,
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
    _replace_parts(recolour)
    return recolour


def _replace_parts(transform: Any) -> None:
    """Put parts of ours in the place of timm's, in place: a posterisation that is mended, moves that are faster."""
    for name in ("transforms", "ops", "policy"):
        for part in getattr(transform, name, ()):
            for each in part if isinstance(part, list) else [part]:
                _replace_parts(each)
    function: Any = getattr(transform, "aug_fn", None)
    name = getattr(function, "__name__", "")
    if name == "posterize":
        transform.aug_fn = _posterize
    elif name in _MOVES:
        transform.aug_fn = partial(_move, function)


# How timm's level of each becomes factor and offset of ``move_rows`` and ``move_columns``.
_MOVES: dict[str, tuple[Callable, Callable[[Image.Image, float], tuple[float, float]]]] = {
    "shear_x": (move_rows, lambda image, level: (level, 0.0)),
    "shear_y": (move_columns, lambda image, level: (level, 0.0)),
    "translate_x_abs": (move_rows, lambda image, level: (0.0, level)),
    "translate_y_abs": (move_columns, lambda image, level: (0.0, level)),
    "translate_x_rel": (move_rows, lambda image, level: (0.0, level * image.width)),
    "translate_y_rel": (move_columns, lambda image, level: (0.0, level * image.height)),
}


def _move(
    timms: Callable, image: Image.Image, level: float, *, fillcolor: tuple[int, ...], resample: Any
) -> Image.Image:
    if resample != Image.Resampling.BICUBIC:
        return timms(image, level, fillcolor=fillcolor, resample=resample)
    move, distances = _MOVES[timms.__name__]
    return move(image, *distances(image, level), fillcolor)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Down to no bit at all, as timm's magnitudes may ask; Pillow refuses that since version 13."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class Mixing:
    """Mixup and CutMix of whole batches, drawn from a call's seed alone. Turns labels into ``[B, num_classes]``."""

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
