"""Shears and translations of pictures, which move every row, or every column, by a distance of its own.

Interpolation then runs along one axis alone, in whole arrays: Pillow's bicubic pixels, up to rounding in float32, in a
fraction of the time of its affine transform, which interpolates along both for every pixel.
"""

import numpy as np
import torch
from PIL import Image

Colour = tuple[int, ...]


def move_rows(image: Image.Image, factor: float, offset: float, fill: Colour) -> Image.Image:
    """``image.transform(image.size, AFFINE, (1, factor, offset, 0, 1, 0), BICUBIC, fillcolor=fill)`` of an RGB picture.

    Args:
        image: Of any size.
        factor: By how many pixels to the left each row moves more than the one above it.
        offset: By how many all rows move.
        fill: What takes the place of pixels from outside.
    """
    pixels = np.asarray(image)  # [H, W, 3]
    height, width, channels = pixels.shape
    shifts = (factor * (np.arange(height) + 0.5) + offset).clip(-width, width)  # further, nothing is left of a row
    whole = np.floor(shifts).astype(np.intp)
    part = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    # Room beside each row for as far as it moves, and for its neighbours; those that count repeat the outermost pixel.
    left, right = max(1 - whole.min(), 2), max(whole.max() + 3, 2)
    padded = np.empty((height, left + width + right, channels), np.uint8)
    padded[:, left : left + width] = pixels
    padded[:, left - 2 : left] = pixels[:, :1]
    padded[:, left + width : left + width + 2] = pixels[:, -1:]
    rows = torch.from_numpy(_windows(padded, width + 3)[np.arange(height), channels * (left + whole - 1)]).float()
    before, here, after, beyond = (rows[:, channels * i : channels * (i + width)] for i in range(4))
    # Pillow's polynomial: here + part (c1 + part (c2 + part c3)).
    one, other = before - here, after - beyond
    cubic = torch.add(other, one, alpha=2).addcmul_((one + other).neg_(), part)
    cubic = torch.addcmul(here, cubic.mul_(part).add_(after).sub_(before), part)
    moved = cubic.clamp_(0, 255).numpy().astype(np.uint8)
    # Pixels whose centre comes from outside, by masks of bytes.
    inside = np.zeros((1, left + width + right, channels), np.uint8)
    inside[:, left : left + width] = 255
    keep = _windows(inside, width)[0, channels * (left + np.floor(shifts + 0.5).astype(np.intp))]
    moved &= keep
    moved |= ~keep & np.tile(np.array(fill, np.uint8), width)
    return Image.fromarray(moved.reshape(height, width, channels))


def _windows(pixels: np.ndarray, width: int) -> np.ndarray:
    """A view of rows ``[H, N, C]``: ``[H, any first byte, C * width]``."""
    return np.lib.stride_tricks.sliding_window_view(pixels.reshape(len(pixels), -1), pixels.shape[2] * width, axis=1)


def move_columns(image: Image.Image, factor: float, offset: float, fill: Colour) -> Image.Image:
    """``image.transform(image.size, AFFINE, (1, 0, 0, factor, 1, offset), ...)``: the same, up instead of left."""
    turned = move_rows(image.transpose(Image.Transpose.TRANSPOSE), factor, offset, fill)
    return turned.transpose(Image.Transpose.TRANSPOSE)
