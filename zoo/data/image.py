"""Decoding pictures, and the transforms between a picture and a model's input."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from zoo.errors import DataError, reason
from zoo.preprocessing import Preprocessing

Transform = Callable[[Image.Image], Tensor]

_INTERPOLATION = {
    "bicubic": v2.InterpolationMode.BICUBIC,
    "bilinear": v2.InterpolationMode.BILINEAR,
    "nearest": v2.InterpolationMode.NEAREST,
}


def decode_image(data: bytes, name: str) -> Image.Image:
    """Any picture that Pillow reads, as RGB (:func:`as_rgb`); of an animation, the first frame.

    Args:
        data: The file's bytes.
        name: Where they came from, for the error message.

    Raises:
        DataError: If this is not a picture, is cut short, or is large enough to exhaust memory.
    """
    if not data:
        raise DataError(f"{name} is empty; expected a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
        return as_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large to decode safely (limit {Image.MAX_IMAGE_PIXELS:,} pixels).") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture of any format that Pillow reads.") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name} is a damaged picture: {reason(error)}.") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB.

    Transparency is laid over white, 16-bit greys are scaled to 8 bits (Pillow's own conversion clips them), and CMYK
    and palettes are converted.
    """
    if image.mode.startswith("I"):  # 16 bits stored as I;16 or as 32-bit integers
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(grey >> 8, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """:func:`decode_image` of a file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read picture {str(path)!r}: {error.strerror}.") from error
    return decode_image(data, str(path))


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """RGB picture -> ``[C, H, W]`` float32: resize, centre crop, scale to 0..1, normalise; equal to timm's."""
    height, width = preprocessing.img_size
    return v2.Compose([_Resize(preprocessing), v2.CenterCrop((height, width)), ToInput(preprocessing)])


class _Resize:
    """Scale so that the crop covers ``crop_pct`` of the picture along its tighter side, or squashed along both."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.target = [int(side / preprocessing.crop_pct) for side in preprocessing.img_size]
        self.squash = preprocessing.crop_mode == "squash"
        self.interpolation = _INTERPOLATION[preprocessing.interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.target
        if self.squash:
            return v2.functional.resize(image, [height, width], interpolation=self.interpolation)
        if height == width:
            return v2.functional.resize(image, [height], interpolation=self.interpolation)
        scale = max(height / image.height, width / image.width)
        size = [max(round(image.height * scale), height), max(round(image.width * scale), width)]
        return v2.functional.resize(image, size, interpolation=self.interpolation)


class ToInput:
    """The last stage of every transform: an RGB picture of the right size -> ``[C, H, W]`` float32, normalised.

    For a model of other than three channels the picture turns grey, repeated.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        # Divided, as timm does it: torchvision's ToDtype multiplies by 1/255, which rounds differently.
        pixels = v2.functional.pil_to_tensor(image).float().div(255)
        if len(self.mean) != 3:
            pixels = v2.functional.rgb_to_grayscale(pixels).expand(len(self.mean), -1, -1)
        return pixels.sub(self.mean).div(self.std)
