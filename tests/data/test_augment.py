"""The training transform is timm's; mixing depends on its seed alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from zoo.data.augment import Mixing, train_transform
from zoo.data.loader import Batch, seeded
from zoo.errors import RecipeError
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Augment

PREPROCESSING = Preprocessing(img_size=(32, 32), interpolation="bilinear")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {"color_jitter": None}),
        ({"scale": (0.5, 0.9), "ratio": (1.0, 1.0), "hflip": 0.0}, {"color_jitter": None}),
        ({"color_jitter": 0.4}, {}),
        ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {}),
        ({"auto_augment": "augmix-m3-w3"}, {}),
        ({"erasing": 1.0}, {"color_jitter": None, "re_prob": 1.0, "re_mode": "pixel"}),
    ],
)
def test_training_is_timms_bit_for_bit(ours: dict, theirs: dict, picture: Image.Image) -> None:
    same = {key: value for key, value in ours.items() if key not in ("erasing",)}
    reference = create_transform(
        (3, 32, 32),
        is_training=True,
        interpolation="bilinear",
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
        **{**same, **theirs},
    )
    transform = train_transform(Augment(**ours), PREPROCESSING)
    for seed in range(5):
        with seeded(seed):
            expected = reference(picture)
        with seeded(seed):
            assert torch.equal(transform(picture), expected)


def test_a_grey_model_trains_on_one_channel(picture: Image.Image) -> None:
    grey = Preprocessing(img_size=(32, 32), mean=(0.5,), std=(0.25,))
    transform = train_transform(Augment(auto_augment="rand-m9", erasing=1.0), grey)
    assert transform(picture).shape == (1, 32, 32)


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-m9-foo3"])
def test_an_unknown_policy_is_a_recipe_error(policy: str) -> None:
    with pytest.raises(RecipeError, match=rf"^augment.auto_augment is '{policy}'; expected timm's notation, such as "):
        train_transform(Augment(auto_augment=policy), PREPROCESSING)


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
