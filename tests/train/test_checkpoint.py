"""Checkpoints: everything comes back bit for bit, nothing half-written is ever current."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.errors import TrainingError, WeightsError
from zoo.train.checkpoint import load_checkpoint, save_checkpoint
from zoo.train.engine import train
from zoo.train.run_folder import RunFolder, write_text


def network(channels: int = 4) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(36 * channels, 2))
    return net.to(memory_format=torch.channels_last)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.rand(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()


OPTIMISERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_to_the_last_bit(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    first, second, average = network(), network(), network()
    make = OPTIMISERS[name]
    optimizer = make(first.parameters())
    steps(first, optimizer, 3)
    progress = {"step": 3, "history": [{"loss": 0.1 + 0.2}], "best": {}}
    save_checkpoint(path, first, average, optimizer, progress, {"seen": torch.arange(3)})

    other, copy = make(second.parameters()), network()
    restored, sampler = load_checkpoint(path, second, copy, other)
    assert restored == progress
    assert sampler["seen"].tolist() == [0, 1, 2]
    steps(first, optimizer, 3)
    steps(second, other, 3)
    for left, right in ((first, second), (average, copy)):
        assert all(map(torch.equal, left.state_dict().values(), right.state_dict().values()))


def test_numbers_that_optimisers_keep_in_their_groups_come_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model = network()
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()], lr=0.1)
    optimizer.param_groups[2]["k"] = 17
    save_checkpoint(path, model, None, optimizer, {}, {})
    other = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()], lr=0.1)
    load_checkpoint(path, model, None, other)
    assert other.param_groups[2]["k"] == 17
    assert other.param_groups[2]["params"][0] is optimizer.param_groups[2]["params"][0]


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"PK\3\4" + data])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(path, model, None, optimizer, {}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=r"^/.*checkpoint.safetensors is not a training checkpoint of zoo, or "):
        load_checkpoint(path, model, None, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, network(), None, torch.optim.SGD(network().parameters()), {}, {})
    wider = network(channels=5)
    with pytest.raises(WeightsError, match=r"does not fit this run's model: size mismatch for [^\n]*\.$"):
        load_checkpoint(path, wider, None, torch.optim.SGD(wider.parameters()))


def test_a_full_disk_keeps_the_previous_checkpoint(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Callable
) -> None:
    fsync, full = os.fsync, False

    def fill_up(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def fill_up_after_an_epoch(rows: list) -> None:
        nonlocal full
        full = True

    recipe = tiny_recipe(**{"train.save_steps": 4})
    whole = train(recipe, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(os, "fsync", fill_up)
    monkeypatch.setattr("zoo.train.progress.Progress.finish_epoch", lambda self, row: fill_up_after_an_epoch(row))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError) as caught:
        train(recipe, folder.path, quiet=True)
    assert str(caught.value) == (
        f"Cannot write {folder.checkpoint}: No space left on device. The previous checkpoint, if any, is kept."
    )
    assert not list(folder.path.glob(".*"))
    monkeypatch.undo()
    train(recipe, folder.path, resume=True, quiet=True)
    assert outcome(folder.path) == outcome(whole.folder)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_files_of_a_run_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "metrics.csv"
    write_text(path, "old")
    if step == "write":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(TrainingError, match=r"^Cannot write .*metrics.csv: No space left on device. What was there "):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
