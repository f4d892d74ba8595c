"""A run that SIGKILL ended again and again equals, to the last bit, the run that nothing interrupted.

Pictures and text, in one process and in two. ``pytest tests/train/test_kills.py --kills 20`` is the whole of it;
without the option nothing runs here, and a few kills are among the tests beside this one.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from zoo.train.engine import train
from zoo.train.recipe import Recipe


@pytest.fixture
def recipe(tiny_recipe: Callable, kind: str, tmp_path: Path) -> Recipe:
    """Whatever is random or has a memory is on; a checkpoint after every second step and after every epoch."""
    both = {
        "optim.clip": 1.0,
        "schedule.epochs": 16,
        "schedule.warmup_epochs": 1,
        "train.ema": 0.9,
        "train.save_steps": 2,
    }
    if kind == "images":
        changes = {
            "model.overrides.drop_path_rate": 0.1,
            "model.overrides.drop_rate": 0.1,
            "data.workers": 1,
            "data.pruning": "loss",
            "augment.auto_augment": "rand-m9-mstd0.5",
            "augment.erasing": 0.2,
            "augment.mixup": 0.2,
            "augment.cutmix": 0.5,
        }
        return tiny_recipe(**both, **changes)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(120)))
    return tiny_recipe(
        **both,
        **{
            "task": "language-modelling",
            "model.name": "matmulfree_2m",
            "model.overrides": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
            "data.name": str(text),
            "data.seq_len": 32,
        },
    )


def train_in_a_group(recipe: Recipe, out: Path, environment: dict[str, str]) -> None:
    """What each process does."""
    os.environ |= environment
    train(recipe, out, resume=True, quiet=True)


def start(recipe: Recipe, out: Path, environments: list[dict[str, str]]) -> list[BaseProcess]:
    """Train in processes that begin at once: their imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.train.engine", "timm.data", "timm.optim", "matplotlib.pyplot"])
    processes = [context.Process(target=train_in_a_group, args=(recipe, out, each)) for each in environments]
    for process in processes:
        process.start()
    return processes


def wait_for_news(path: Path, processes: list[BaseProcess]) -> None:
    """Return when the file at ``path`` appears or changes, or a process ends."""

    def stamp() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    before, deadline = stamp(), time.monotonic() + 600
    while stamp() == before and all(process.is_alive() for process in processes):
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)


def ended(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.timeout(0)  # twenty kills of four runs take as long as they take
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["images", "text"])
def test_killed_again_and_again(
    recipe: Recipe,
    kind: str,
    world: int,
    tmp_path: Path,
    group: Callable,
    outcome: Callable,
    pytestconfig: pytest.Config,
) -> None:
    wanted = pytestconfig.getoption("--kills")
    if not wanted:
        pytest.skip("needs --kills")
    assert ended(start(recipe, tmp_path / "whole", group(world))) == [0] * world
    seed = time.time_ns()
    print("seed of the delays:", seed)  # shown when the test fails
    delays, run, kills = random.Random(seed), tmp_path / "run", 0
    while not (run / "result.json").exists():
        processes = start(recipe, run, group(world))
        wait_for_news(run / "checkpoint.safetensors", processes)
        time.sleep(delays.uniform(0, 0.3))
        for process in processes:
            if kills < wanted:
                process.kill()
        codes = ended(processes)
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes == [-signal.SIGKILL] * world
    print(f"{kind}, {world} processes: {kills} kills")
    assert kills == wanted
    assert outcome(run) == outcome(tmp_path / "whole")
