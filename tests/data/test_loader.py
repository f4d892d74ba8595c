"""Order and augmentation are functions of (seed, epoch, sample): not of workers, batches, processes or history."""

import errno
import io
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import loader as loader_module
from zoo.data.augment import TrainTransform
from zoo.data.image import EvalTransform, Normalise
from zoo.data.loader import _AHEAD, _HELD, Batch, EpochSampler, ImageSamples, Loader, derive_seed, seeded
from zoo.data.sources import FolderSource, open_stream
from zoo.errors import DataError, TrainingError
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Augment

PREPROCESSING = Preprocessing(img_size=(16, 16))
NORMALISE = Normalise(PREPROCESSING)


def training_loader(root: Path, *, workers: int = 0, batch_size: int = 8, seed: int = 0) -> Loader:
    source = FolderSource(root)
    transform = TrainTransform(Augment(auto_augment="rand-m9-mstd0.5", erasing=0.5), PREPROCESSING)
    dataset = ImageSamples(source, np.arange(0, len(source), 2), transform, seed=seed)
    return Loader(dataset, EpochSampler(len(dataset), batch_size, shuffle=True, seed=seed), workers=workers)


def epoch_of(loader: Loader, epoch: int, consumed: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, consumed)
    return list(loader)


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(NORMALISE(a.inputs, a.patches), NORMALISE(b.inputs, b.patches))
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.indices, b.indices)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(class_folder: Path, workers: int) -> None:
    alone, helped = training_loader(class_folder), training_loader(class_folder, workers=workers)
    for epoch in (0, 1, 0):
        assert equal(epoch_of(alone, epoch), epoch_of(helped, epoch))
    assert equal(epoch_of(alone, 2, consumed=16), epoch_of(helped, 2, consumed=16))


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
    assert equal(whole[2:], epoch_of(training_loader(class_folder), 1, consumed=16))


@pytest.mark.parametrize("worlds", [(1, 2), (2, 4), (4, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_epoch_goes_on_with_other_processes(worlds: tuple[int, int], steps: int) -> None:
    """Nothing is lost or repeated, and on equally many the order is the uninterrupted one."""

    def epoch(world: int, consumed: int = 0) -> list[list[list[int]]]:
        samplers = [EpochSampler(103, 12 // world, shuffle=True, seed=5, rank=r, world=world) for r in range(world)]
        for sampler in samplers:
            sampler.set_epoch(2, consumed)
        return [[[position for _, position, _ in batch] for batch in sampler] for sampler in samplers]

    before = epoch(worlds[0])
    after = epoch(worlds[1], consumed=12 * steps)
    done = [position for each in before for batch in each[:steps] for position in batch]
    rest = [position for each in after for batch in each for position in batch]
    assert len(done) == 12 * steps
    assert sorted(done + rest) == sorted(set(done + rest))
    assert len(done + rest) == 103 // 12 * 12
    if worlds[0] == worlds[1]:
        assert after == [each[steps:] for each in before]
    # whatever their number, the processes together take the same samples in every step
    everyone = [sorted(position for each in before for position in each[i]) for i in range(len(before[0]))]
    alone = [sorted(batch) for batch in epoch(1)[0]]
    assert everyone == alone


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
    positions = [position for sampler in samplers for batch in sampler for _, position, _ in batch]
    assert sorted(positions) == list(range(size))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_on_different_samples_in_equal_steps(world: int) -> None:
    samplers = [EpochSampler(23, 3, shuffle=True, rank=rank, world=world) for rank in range(world)]
    epochs = [list(sampler) for sampler in samplers]
    assert {len(epoch) for epoch in epochs} == {len(samplers[0])} == {23 // world // 3}
    positions = [position for epoch in epochs for batch in epoch for _, position, _ in batch]
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
    dataset = ImageSamples(FolderSource(tmp_path), np.arange(1), EvalTransform(PREPROCESSING), seed=0)
    loader = Loader(dataset, EpochSampler(1, 1, shuffle=False), workers=workers)
    with pytest.raises(
        DataError, match=r"^/.*/cat/bad.png is not a picture of any format that Pillow reads. data.max_corrupt=10 would"
    ):
        list(loader)
    tolerant = Loader(dataset, EpochSampler(1, 1, shuffle=False), workers=workers, max_corrupt=1)
    with pytest.raises(DataError, match=r"^Not one sample could be read. /.*/cat/bad.png is not a picture "):
        list(tolerant)


@pytest.fixture
def damaged(class_folder: Path, tmp_path: Path) -> Path:
    """The class folder with three of its 60 pictures damaged."""
    shutil.copytree(class_folder, tmp_path / "damaged")
    for name in ("red/03.png", "red/04.png", "blue/10.png"):
        (tmp_path / "damaged" / name).write_bytes(b"no picture")
    return tmp_path / "damaged"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_damaged_pictures_are_replaced_in_training(damaged: Path, workers: int) -> None:
    def loader(limit: int) -> Loader:
        samples = ImageSamples(FolderSource(damaged), np.arange(60), EvalTransform(PREPROCESSING), seed=0, replace=True)
        return Loader(samples, EpochSampler(60, 8, shuffle=True), workers=workers, max_corrupt=limit)

    first = loader(3)
    batches = epoch_of(first, 0)
    assert [len(batch.inputs) for batch in batches] == [8] * 7
    assert equal(batches, epoch_of(loader(3), 0))
    assert equal(batches[2:], epoch_of(loader(3), 0, consumed=16))
    epoch_of(first, 1)
    assert sorted(first.skipped) == [str(damaged / name) for name in ("blue/10.png", "red/03.png", "red/04.png")]
    with pytest.raises(
        DataError, match=r"^3 samples cannot be read, data.max_corrupt allows 2. .*png is not a picture "
    ):
        [epoch_of(strict, epoch) for strict in [loader(2)] for epoch in (0, 1)]


@pytest.mark.parametrize("batch_size, workers", [(8, 0), (1, 0), (1, 1)])
def test_damaged_pictures_are_left_out_of_an_evaluation(damaged: Path, batch_size: int, workers: int) -> None:
    """Also where they are all that a batch has."""
    samples = ImageSamples(FolderSource(damaged), np.arange(60), EvalTransform(PREPROCESSING), seed=0)
    loader = Loader(samples, EpochSampler(60, batch_size, shuffle=False), workers=workers, max_corrupt=3)
    seen = torch.cat([batch.indices for batch in loader])
    assert len(seen) == 57
    assert len(loader.skipped) == 3


def test_a_worker_that_is_killed_is_one_clear_line(class_folder: Path) -> None:
    class Fatal(ImageSamples):
        def batch(self, keys: list, memory: object = None) -> Batch:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    samples = Fatal(FolderSource(class_folder), np.arange(8), EvalTransform(PREPROCESSING), seed=0)
    message = r"^A data worker died: DataLoader worker .* Most often memory ran out: lower .*--resume auto.$"
    with pytest.raises(TrainingError, match=message):
        list(Loader(samples, EpochSampler(8, 4, shuffle=False), workers=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_a_stream_is_shared_out_and_resumed_like_data_at_rest(tmp_path: Path, workers: int) -> None:
    import datasets

    pictures = [{"bytes": encode(i), "path": None} for i in range(24)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": pictures, "label": [i % 2 for i in range(24)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-0.parquet")

    def epoch(world: int, consumed: int = 0) -> list[list[list[int]]]:
        """The grey levels by process and batch."""
        answer = []
        for rank in range(world):
            stream = open_stream(str(tmp_path), size=24, seed=1)
            samples = ImageSamples(stream, None, EvalTransform(Preprocessing(img_size=(1, 1))), seed=0)
            sampler = EpochSampler(24, 4 // world, shuffle=False, drop_last=True, rank=rank, world=world)
            loader = Loader(samples, sampler, workers=workers)
            answer.append([batch.inputs[:, 0, 0, 0].tolist() for batch in epoch_of(loader, 1, consumed)])
        return answer

    [alone] = epoch(1)
    levels = [level for batch in alone for level in batch]
    assert sorted(levels) == list(range(24)) != levels
    assert epoch(1, consumed=8) == [alone[2:]]
    pair = epoch(2, consumed=8)
    assert [sorted(left + right) for left, right in zip(*pair, strict=True)] == [sorted(batch) for batch in alone[2:]]


def encode(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1), level).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers do not share memory with the main process")
def test_batches_that_are_kept_keep_their_pictures(class_folder: Path) -> None:
    """More batches than there are slots, all kept; then dropped, and the slots are there again."""
    loader = training_loader(class_folder, workers=1, batch_size=4)
    alone = epoch_of(training_loader(class_folder, batch_size=4), 0)
    assert len(alone) > _AHEAD + _HELD
    for _ in range(2):
        kept = epoch_of(loader, 0)
        assert equal(kept, alone)
        first = [batch.inputs[0] for batch in kept]  # views keep a slot too
        del kept
        assert all(torch.equal(view, batch.inputs[0]) for view, batch in zip(first, alone, strict=True))
        del first
    slots = loader._slots
    assert slots is not None
    assert sorted(slots._free) == list(range(_AHEAD + _HELD))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers do not share memory with the main process")
def test_an_epoch_left_in_the_middle_leaves_no_slot_behind(class_folder: Path) -> None:
    loader = training_loader(class_folder, workers=1, batch_size=4)
    for epoch in range(3):
        loader.set_epoch(epoch)
        next(iter(loader))
    assert equal(epoch_of(loader, 1), epoch_of(training_loader(class_folder, batch_size=4), 1))
    slots = loader._slots
    assert slots is not None
    assert sorted(slots._free) == list(range(_AHEAD + _HELD))


def test_pictures_larger_than_their_slot_come_in_memory_of_their_own(class_folder: Path) -> None:
    def loader(workers: int) -> Loader:
        transform = TrainTransform(Augment(), PREPROCESSING, lambda epoch: (16, 16) if epoch else (24, 24))
        samples = ImageSamples(FolderSource(class_folder), None, transform, seed=0)
        return Loader(samples, EpochSampler(8, 4, shuffle=True), workers=workers)

    alone, helped = loader(0), loader(1)
    for epoch in (0, 1, 0):
        batches = epoch_of(helped, epoch)
        assert {batch.inputs.shape[-1] for batch in batches} == {16 if epoch else 24}
        assert equal(epoch_of(alone, epoch), batches)


def test_without_shared_memory_batches_come_in_their_own(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    alone = epoch_of(training_loader(class_folder), 0)
    monkeypatch.setattr(loader_module, "Slots", refuse)
    assert equal(epoch_of(training_loader(class_folder, workers=1), 0), alone)
