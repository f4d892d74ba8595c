"""Any picture becomes RGB or one clear error; the evaluation transform is timm's to the last bit."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from zoo.data import image
from zoo.data.image import Box, EvalTransform, Normalise, decode_crop, decode_image, read_image
from zoo.errors import DataError
from zoo.preprocessing import Preprocessing


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(preprocessing: Preprocessing, picture: Image.Image) -> torch.Tensor:
    """What the model sees."""
    return Normalise(preprocessing)(EvalTransform(preprocessing)(picture)[None])[0]


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, "here.png")
    assert image.mode == "RGB"
    return np.asarray(image)


JPEG = encode(noise(64, 48), "JPEG")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"here is empty; expected a picture."),
        (b"label,picture\n0,a.png\n", r"here is not a picture of any format that Pillow reads."),
        (JPEG[: len(JPEG) // 2], r"here is a damaged picture: image file is truncated.*\."),
        (encode(noise(40, 40))[:300], r"here is a damaged picture: .+\."),
        (JPEG[:2] + bytes(200), r"here is .*\."),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), r"here is .*\."),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "corrupt JPEG", "corrupt PNG"],
)
def test_unreadable_pictures_are_one_clear_line(data: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(data, "here")
    assert re.fullmatch(message, str(caught.value))  # a dot does not match a line break
    assert " at 0x" not in str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = encode(Image.new("1", (20_000, 10_000)))  # 200 million pixels in a few kilobytes
    with pytest.raises(DataError, match=r"^here is too large to decode safely \(limit 89,478,485 pixels\).$"):
        decode_image(bomb, "here")


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^Cannot read picture '.*/no.png': No such file or directory.$"):
        read_image(tmp_path / "no.png")
    with pytest.raises(DataError, match=r"^Cannot read picture '.*': Is a directory.$"):
        read_image(tmp_path)


def test_one_pixel() -> None:
    data = encode(Image.new("RGB", (1, 1), (1, 2, 3)))
    assert decoded(data).tolist() == [[[1, 2, 3]]]
    out = prepared(Preprocessing(img_size=(32, 48)), decode_image(data, "here"))
    assert out.shape == (3, 32, 48)
    assert out.isfinite().all()


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    levels = np.array([[0, 0x7F00, 0x80FF, 0xFFFF]], dtype=np.uint16)
    assert decoded(encode(Image.fromarray(levels)))[0].tolist() == [[value] * 3 for value in (0, 127, 128, 255)]


def test_cmyk() -> None:
    cyan = decoded(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(cyan.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("mode, colour", [("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))])
def test_transparency_is_laid_over_white(mode: str, colour: tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), (*colour[:-1], 255))
    assert decoded(encode(image)).tolist() == [[[255] * 3, [9] * 3]]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encode(image, transparency=1)
    assert decoded(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert decoded(encode(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("make", [lambda: Image.new("1", (3, 3), 1), lambda: Image.new("L", (3, 3), 255)])
def test_black_and_white_and_grey(make: Callable[[], Image.Image]) -> None:
    assert (decoded(encode(make())) == 255).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side, crop_pct", [(32, 1.0), (96, 0.875), (224, 0.9)])
@pytest.mark.parametrize("width, height", [(8, 8), (97, 64), (256, 300)])
def test_evaluation_is_timms_bit_for_bit(
    width: int, height: int, side: int, crop_pct: float, interpolation: str, crop_mode: str
) -> None:
    ours = Preprocessing(img_size=(side, side), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    theirs = create_transform(
        (3, side, side),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=ours.mean,
        std=ours.std,
    )
    picture = noise(width, height)
    assert torch.equal(prepared(ours, picture), theirs(picture))


def test_a_crop_that_is_not_square_keeps_the_proportions() -> None:
    picture = Image.new("RGB", (100, 100), "black")
    picture.paste("white", (40, 40, 60, 60))  # a square in the middle stays one
    out = prepared(Preprocessing(img_size=(50, 100), crop_pct=1.0, interpolation="nearest"), picture)
    assert out.shape == (3, 50, 100)
    bright = (out[0] > 0).nonzero()
    assert (bright.max(0).values - bright.min(0).values + 1).tolist() == [20, 20]


def test_a_grey_model_gets_one_normalised_channel() -> None:
    preprocessing = Preprocessing(img_size=(4, 4), crop_pct=1.0, mean=(0.5,), std=(0.25,))
    out = prepared(preprocessing, Image.new("RGB", (4, 4), (255, 0, 0)))
    assert out.shape == (1, 4, 4)
    torch.testing.assert_close(out, torch.full((1, 4, 4), (0.2989 - 0.5) / 0.25), atol=0.01, rtol=0)


def smooth(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 40), np.cos(columns / 50), np.sin((rows + columns) / 70)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("box, shrink", [(Box(10, 20, 60, 50), 1), (Box(0, 64, 400, 320), 2), (Box(8, 0, 888, 960), 4)])
def test_a_crop_is_the_pictures_part(mode: str, box: Box, shrink: int) -> None:
    picture = smooth(1000, 900)
    data = encode(picture.convert(mode), "JPEG", quality=95)
    sizes: list[tuple[int, int]] = []

    def choose(*size: int) -> Box:
        sizes.append(size)
        return box

    part = decode_crop(data, "here", choose, (200, 160))
    assert sizes == [(900, 1000)]
    assert part.shape == (3, -(-box.height // shrink), -(-box.width // shrink))
    whole = decode_image(data, "here").crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(whole.resize((part.shape[2], part.shape[1]), Image.Resampling.BOX), dtype=int)
    assert np.abs(part.permute(1, 2, 0).numpy() - expected).max() <= 4


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30, "optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quick_decoder_gives_pillows_pixels(mode: str, options: dict) -> None:
    data = encode(noise(75, 49).convert(mode), "JPEG", **options)
    pixels = image._decode_jpeg(data)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, decoded(data))


def test_without_the_quick_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    box = lambda height, width: Box(3, 5, 30, 40)  # noqa: E731
    quick = decode_crop(JPEG, "here", box, (32, 32))
    monkeypatch.setattr(image, "_jpeg_decoder", lambda: None)
    torch.testing.assert_close(decode_crop(JPEG, "here", box, (32, 32)), quick, rtol=0, atol=0)


def test_pillow_judges_what_the_quick_decoder_refuses() -> None:
    unusual = JPEG[:-20] + b"\0" * 18 + JPEG[-2:]
    assert image._decode_jpeg(unusual) is None
    assert decode_crop(unusual, "here", lambda height, width: Box(0, 0, height, width), (48, 64)).shape == (3, 48, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_pictures_are_not_cropped(kind: str) -> None:
    data = encode(noise(64, 48), kind)
    for damaged in (data[: len(data) // 2], data[:50], b"", b"text"):
        with pytest.raises(DataError, match=r"^here is "):
            decode_crop(damaged, "here", lambda height, width: Box(0, 0, height, width), (32, 32))
