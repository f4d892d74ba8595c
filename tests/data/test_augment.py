"""The training transform is timm's; mixing depends on its seed alone."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from zoo.data import augment
from zoo.data.augment import Mixing, TrainTransform
from zoo.data.image import Normalise
from zoo.data.loader import Batch, seeded
from zoo.data.shift import move_columns, move_rows
from zoo.errors import RecipeError
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Augment

PREPROCESSING = Preprocessing(img_size=(32, 32), interpolation="bilinear")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def prepared(augment: Augment, preprocessing: Preprocessing, picture: Image.Image) -> torch.Tensor:
    """What the model sees."""
    pixels, patch = TrainTransform(augment, preprocessing).load(encoded(picture), "here", 0)
    return Normalise(preprocessing)(pixels[None], [patch])[0]


SETTINGS = [
    ({}, {"color_jitter": None}),
    ({"scale": (0.5, 0.9), "ratio": (1.0, 1.0), "hflip": 0.0}, {"color_jitter": None}),
    ({"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}, {"color_jitter": None}),  # fits never: the middle
    ({"color_jitter": 0.4}, {}),
    ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {}),
    ({"auto_augment": "augmix-m3-w3"}, {}),
    ({"erasing": 1.0}, {"color_jitter": None, "re_prob": 1.0, "re_mode": "pixel"}),
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("ours, theirs", SETTINGS)
def test_training_is_timms(ours: dict, theirs: dict, interpolation: str, picture: Image.Image) -> None:
    """Equal draws, equal pixels: torch's kernels round their weights differently, which shows in noise."""
    same = {key: value for key, value in ours.items() if key != "erasing"}
    for side in (32, 24):
        preprocessing = Preprocessing(img_size=(side, side), interpolation=interpolation)
        reference = create_transform(
            (3, side, side),
            is_training=True,
            interpolation=interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            **{**same, **theirs},
        )
        shares = []
        for seed in range(8):
            with seeded(seed):
                expected = reference(picture)
            with seeded(seed):
                found = prepared(Augment(**ours), preprocessing, picture)
            levels = ((found - expected).abs() * torch.tensor(preprocessing.std)[:, None, None] * 255).round()
            shares.append((levels <= 1).float().mean().item())
        assert np.mean(shares) > 0.97
        assert np.median(shares) > 0.99


def test_a_grey_model_trains_on_one_channel(picture: Image.Image) -> None:
    grey = Preprocessing(img_size=(32, 32), mean=(0.5,), std=(0.25,))
    assert prepared(Augment(auto_augment="rand-m9", erasing=1.0), grey, picture).shape == (1, 32, 32)


def test_one_pixel_can_be_augmented() -> None:
    pixel = Image.new("RGB", (1, 1), (5, 6, 7))
    for seed in range(10):
        with seeded(seed):
            assert prepared(Augment(), PREPROCESSING, pixel).isfinite().all()


def test_posterising_to_nothing_is_black(picture: Image.Image) -> None:
    """Which timm's strongest magnitudes ask for, and Pillow refuses."""
    transform = TrainTransform(Augment(auto_augment="rand-m10-n2-inc1"), PREPROCESSING)
    assert transform.recolour is not None
    [policy] = transform.recolour.transforms
    [posterise] = [op for op in policy.ops if "Posterize" in op.name]
    posterise.prob = 1.0
    assert not np.asarray(posterise(picture)).any()


@pytest.mark.parametrize("shape", [(224, 200), (5, 7), (1, 1)])
@pytest.mark.parametrize("factor, offset", [(0.3, 0), (-0.27, 0), (0, 50.3), (0, -3.7), (0, 4), (0.1, -3.2), (0, 1e4)])
def test_moves_are_pillows(shape: tuple[int, int], factor: float, offset: float) -> None:
    """Equal but for rounding in float32, where Pillow has float64 and cuts off."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    fill = (1, 20, 255)
    for move, matrix in ((move_rows, (1, factor, offset, 0, 1, 0)), (move_columns, (1, 0, 0, factor, 1, offset))):
        how = Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        expected = picture.transform(picture.size, *how, fillcolor=fill)
        levels = np.abs(np.asarray(move(picture, factor, offset, fill), int) - np.asarray(expected, int))
        assert levels.max() <= 1
        assert (levels > 0).mean() < 1e-3


def test_every_move_of_timms_is_replaced(picture: Image.Image) -> None:
    transform = TrainTransform(Augment(auto_augment="rand-m9-mstd0.5-inc1"), Preprocessing(img_size=(32, 32)))
    assert transform.recolour is not None
    [policy] = transform.recolour.transforms
    moves = {op.name for op in policy.ops if getattr(op.aug_fn, "func", None) is augment._move}
    assert moves == {"ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-m9-foo3"])
def test_an_unknown_policy_is_a_recipe_error(policy: str) -> None:
    with pytest.raises(RecipeError, match=rf"^augment.auto_augment is '{policy}'; expected timm's notation, such as "):
        TrainTransform(Augment(auto_augment=policy), PREPROCESSING)


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1}])
def test_mixing_depends_on_its_seed_alone(alphas: dict[str, float]) -> None:
    def mix(*seed: int) -> Batch:
        return mixing(Batch(inputs.clone(), targets, torch.arange(4)), *seed)

    mixing = Mixing(Augment(**alphas), num_classes=3)
    inputs, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mixed, again, other = mix(0, 7), mix(0, 7), mix(0, 8)
    assert torch.equal(mixed.inputs, again.inputs)
    assert torch.equal(mixed.targets, again.targets)
    assert not torch.equal(mixed.targets, other.targets)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(4))
    assert not torch.equal(mixed.inputs, inputs)


def test_mixing_leaves_the_global_generators_alone() -> None:
    mixing = Mixing(Augment(mixup=0.8), num_classes=2)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    mixing(Batch(torch.rand(2, 3, 4, 4, generator=torch.Generator()), torch.tensor([0, 1]), torch.arange(2)), 5)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
