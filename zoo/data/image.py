"""Decoding pictures, and the transforms between a picture and a model's input."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from zoo.errors import DataError, reason
from zoo.preprocessing import Preprocessing


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, vertical: float, horizontal: float) -> "Box":
        """The same part of a picture of another size."""
        top, left = round(self.top * vertical), round(self.left * horizontal)
        bottom, right = (self.top + self.height) * vertical, (self.left + self.width) * horizontal
        return Box(top, left, max(round(bottom) - top, 1), max(round(right) - left, 1))


class Patch(NamedTuple):
    """What is laid over a part of a normalised picture."""

    top: int
    left: int
    values: Tensor  # [C, h, w] float32


class Transform(Protocol):
    """From a picture's file to the pixels that a model sees, and a patch to lay over them."""

    largest: tuple[int, int]  # (height, width) that no picture exceeds

    def load(self, data: bytes, name: str, epoch: int) -> tuple[Tensor, Patch | None]:
        """``[3, H, W]`` uint8. The epoch may decide how strongly, or at which size, pictures are varied.

        Raises:
            DataError: If it is not a picture; ``name`` says where it came from.
        """
        ...


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
    with _opened(data, name) as image:
        image.load()
        return as_rgb(image)


def image_format(data: bytes, name: str) -> str:
    """Pillow's name of a picture's format, from its header alone.

    Raises:
        DataError: As for :func:`decode_image`, but for what comes after the header.
    """
    with _opened(data, name) as image:
        return image.format or ""


def decode_crop(data: bytes, name: str, choose: Callable[[int, int], Box], size: tuple[int, int]) -> Tensor:
    """A part of a picture, not resized yet, decoded with no more work than ``size`` needs.

    A JPEG of which the part is at least twice as large as ``size`` is decoded at 1/2, 1/4 or 1/8 of its size, which its
    cosine transform allows at a fraction of the cost.

    Args:
        data: The file's bytes.
        name: Where they came from, for the error message.
        choose: From the picture's height and width to the part.
        size: (height, width) that the part will be resized to.

    Returns:
        ``[3, h, w]`` uint8, RGB, pixel by pixel in memory.

    Raises:
        DataError: As for :func:`decode_image`.
    """
    box = None
    if (sides := _jpeg_sides(data)) is not None:
        box = choose(*sides)
        if _shrink(box, size) < 2 and (pixels := _decode_jpeg(data)) is not None:
            inside = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
            return torch.from_numpy(inside).permute(2, 0, 1)
    with _opened(data, name) as image:
        width, height = image.size
        box = box or choose(height, width)  # drawn once
        if image.format == "JPEG" and (shrink := _shrink(box, size)) >= 2:
            image.draft("RGB", (width // shrink, height // shrink))  # the nearest power of two that is not smaller
            box = box.scaled(image.height / height, image.width / width)
        part = as_rgb(image).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def _shrink(box: Box, size: tuple[int, int]) -> int:
    """How many times the part is as large as ``size``."""
    return min(box.height // size[0], box.width // size[1])


def _jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that :func:`_decode_jpeg` may take; None leaves the file to Pillow."""
    decoder = _jpeg_decoder()
    if decoder is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = decoder.decode_jpeg_header(data)
    except ValueError:
        return None
    small = height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (height, width) if small and colours in ("YCbCr", "Gray") else None


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """``[H, W, 3]`` by libjpeg-turbo itself: Pillow's pixels in less time. None leaves the file to Pillow."""
    decoder = _jpeg_decoder()
    if decoder is None:
        return None
    try:
        return decoder.decode_jpeg(data, "RGB")
    except ValueError:  # anything unusual about the file: Pillow says whether that is damage
        return None


@cache
def _jpeg_decoder() -> ModuleType | None:
    return import_module("simplejpeg") if find_spec("simplejpeg") else None  # the extra ``train`` brings it


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The picture with its header read; whatever goes wrong in the block is a :class:`DataError`."""
    if not data:
        raise DataError(f"{name} is empty; expected a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield Image.open(io.BytesIO(data))
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
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """:func:`decode_image` of a file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read picture {str(path)!r}: {error.strerror}.") from error
    return decode_image(data, str(path))


class EvalTransform:
    """RGB picture -> ``[3, H, W]`` uint8: resize and centre crop, equal to timm's."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.largest = preprocessing.img_size
        self._steps = v2.Compose([_Resize(preprocessing), v2.CenterCrop(list(preprocessing.img_size))])

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(self._steps(image))).permute(2, 0, 1)

    def load(self, data: bytes, name: str, epoch: int) -> tuple[Tensor, Patch | None]:
        return self(decode_image(data, name)), None


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


class Normalise:
    """The last stage, on the device: ``[B, 3, H, W]`` uint8 -> ``[B, C, H, W]`` float32, scaled to 0..1 and normalised.

    For a model of other than three channels the pictures turn grey, repeated. Patches are laid over afterwards.

    Args:
        preprocessing: Mean and deviation of each channel.
        reuse: On a CPU, write every batch into the same memory: an answer then lasts until the next one. Fresh memory
            costs several times what the arithmetic does.
    """

    def __init__(self, preprocessing: Preprocessing, *, reuse: bool = False) -> None:
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]
        self.reuse = reuse
        self._memory = torch.empty(0)

    def __call__(self, pixels: Tensor, patches: Sequence[Patch | None] = ()) -> Tensor:
        # Divided, as timm does it: torchvision's ToDtype multiplies by 1/255, which rounds differently.
        if pixels.device.type != "cpu" or len(self.mean) != 3:
            self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
            inputs = pixels.float().div_(255)
            if len(self.mean) != 3:
                inputs = v2.functional.rgb_to_grayscale(inputs).repeat(1, len(self.mean), 1, 1)
            inputs.sub_(self.mean).div_(self.std)
        else:
            inputs = self._on_cpu(pixels)
        for image, patch in zip(inputs, patches, strict=False):
            if patch is not None:
                height, width = patch.values.shape[1:]
                area = image[:, patch.top : patch.top + height, patch.left : patch.left + width]
                area.copy_(patch.values, non_blocking=True)
        return inputs

    def _on_cpu(self, pixels: Tensor) -> Tensor:
        """Picture by picture, so that each stays in the cache through all steps, and in whole rows of pixels."""
        batch, _, height, width = pixels.shape
        rows = pixels.permute(0, 2, 3, 1).reshape(batch, height, 3 * width)
        if not self.reuse or len(self._memory) < rows.numel():
            self._memory = torch.empty(rows.numel())
        inputs = self._memory[: rows.numel()].view(rows.shape)
        mean, std = (values.flatten().repeat(width) for values in (self.mean, self.std))
        for target, row in zip(inputs, rows, strict=True):
            target.copy_(row).div_(255).sub_(mean).div_(std)
        return inputs.view(batch, height, width, 3).permute(0, 3, 1, 2)
