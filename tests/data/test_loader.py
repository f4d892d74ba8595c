"""Order and augmentation are functions of (seed, epoch, sample): not of workers, batches, processes or history."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data.augment import train_transform
from zoo.data.image import eval_transform
from zoo.data.loader import Batch, EpochSampler, ImageDataset, Loader, derive_seed, seeded
from zoo.data.sources import FolderSource
from zoo.errors import DataError
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Augment

PREPROCESSING = Preprocessing(img_size=(16, 16))


def training_loader(root: Path, *, workers: int = 0, batch_size: int = 8, seed: int = 0) -> Loader:
    source = FolderSource(root)
    transform = train_transform(Augment(auto_augment="rand-m9-mstd0.5", erasing=0.5), PREPROCESSING)
    dataset = ImageDataset(source, np.arange(0, len(source), 2), transform, seed=seed)
    return Loader(dataset, EpochSampler(len(dataset), batch_size, shuffle=True, seed=seed), workers=workers)


def epoch_of(loader: Loader, epoch: int, start: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start)
    return list(loader)


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(class_folder: Path, workers: int) -> None:
    alone, helped = training_loader(class_folder), training_loader(class_folder, workers=workers)
    for epoch in (0, 1, 0):
        assert equal(epoch_of(alone, epoch), epoch_of(helped, epoch))
    assert equal(epoch_of(alone, 2, start=2), epoch_of(helped, 2, start=2))


def test_an_epoch_depends_on_seed_and_number_only(class_folder: Path) -> None:
    loader = training_loader(class_folder)
    first = epoch_of(loader, 0)
    assert not equal(first, epoch_of(loader, 1))
    assert not equal(first, epoch_of(training_loader(class_folder, seed=1), 0))
    assert equal(first, epoch_of(loader, 0))


def test_augmentation_does_not_depend_on_the_batch_it_falls_in(class_folder: Path) -> None:
    eights, threes = (epoch_of(training_loader(class_folder, batch_size=size), 0) for size in (8, 3))
    assert torch.equal(torch.cat([batch.inputs for batch in eights]), torch.cat([b.inputs for b in threes])[:24])


def test_resuming_in_mid_epoch_goes_on_with_the_next_batch(class_folder: Path) -> None:
    whole = epoch_of(training_loader(class_folder), 1)
    assert equal(whole[2:], epoch_of(training_loader(class_folder), 1, start=2))


def test_an_abandoned_epoch_leaves_nothing_behind(class_folder: Path) -> None:
    loader = training_loader(class_folder, workers=1, batch_size=4)
    expected = epoch_of(loader, 1)
    loader.set_epoch(0)
    next(iter(loader))
    assert equal(expected, epoch_of(loader, 1))


def test_incomplete_batches_are_dropped_in_training_only() -> None:
    assert [len(batch) for batch in EpochSampler(10, 4, shuffle=True)] == [4, 4]
    assert [len(batch) for batch in EpochSampler(10, 4, shuffle=False)] == [4, 4, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size, batch_size", [(20, 4), (23, 4), (5, 8), (2, 1)])
def test_processes_share_an_evaluation_out(size: int, batch_size: int, world: int) -> None:
    samplers = [EpochSampler(size, batch_size, shuffle=False, rank=rank, world=world) for rank in range(world)]
    positions = [position for sampler in samplers for batch in sampler for _, position in batch]
    assert sorted(positions) == list(range(size))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_on_different_samples_in_equal_steps(world: int) -> None:
    samplers = [EpochSampler(23, 3, shuffle=True, rank=rank, world=world) for rank in range(world)]
    epochs = [list(sampler) for sampler in samplers]
    assert {len(epoch) for epoch in epochs} == {len(samplers[0])} == {23 // world // 3}
    positions = [position for epoch in epochs for batch in epoch for _, position in batch]
    assert len(set(positions)) == len(positions)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(class_folder: Path, workers: int) -> None:
    def state() -> tuple:
        return random.getstate(), tuple(np.random.get_state()[1]), tuple(torch.get_rng_state().tolist())

    before = state()
    epoch_of(training_loader(class_folder, workers=workers), 0)
    assert state() == before


def test_seeded_is_reproducible_and_restores_after_an_error() -> None:
    before = torch.get_rng_state()
    draws = []

    def draw_and_fail() -> None:
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError), seeded(3, 1, 4):
            draw_and_fail()
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_near_parts_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_one_clear_line_from_any_process(tmp_path: Path, workers: int) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(b"no picture")
    dataset = ImageDataset(FolderSource(tmp_path), np.arange(1), eval_transform(PREPROCESSING), seed=0)
    loader = Loader(dataset, EpochSampler(1, 1, shuffle=False), workers=workers)
    with pytest.raises(DataError, match=r"^/.*/cat/bad.png is not a picture of any format that Pillow reads.$"):
        list(loader)
