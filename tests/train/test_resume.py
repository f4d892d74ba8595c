"""A run that was killed and resumed equals, to the last bit, the run that was not."""

import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from zoo.train import engine
from zoo.train.engine import train
from zoo.train.recipe import Recipe
from zoo.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable) -> Recipe:
    """Whatever is random or has a memory is on; 18 steps, a checkpoint every 2 and after each epoch."""
    return tiny_recipe(
        **{
            "model.overrides.drop_path_rate": 0.1,
            "model.overrides.drop_rate": 0.1,
            "data.workers": 1,
            "augment.auto_augment": "rand-m9-mstd0.5",
            "augment.erasing": 0.2,
            "augment.mixup": 0.2,
            "augment.cutmix": 0.5,
            "augment.smoothing": 0.1,
            "optim.clip": 1.0,
            "optim.layer_decay": 0.9,
            "schedule.epochs": 3,
            "schedule.warmup_epochs": 1,
            "train.ema": 0.9,
            "train.save_steps": 2,
            "train.tensorboard": True,
        }
    )


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    return train(recipe, tmp_path_factory.mktemp("whole") / "run", quiet=True).folder


def start(recipe: Recipe, out: Path) -> BaseProcess:
    """Train in a process of its own, which begins at once: its imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["zoo.train.engine", "timm.data", "timm.optim", "matplotlib.pyplot", "torch.utils.tensorboard"]
    )
    process = context.Process(target=train, args=(recipe, out), kwargs={"resume": True, "quiet": True})
    process.start()
    return process


def wait_for_news(path: Path, process: BaseProcess | subprocess.Popen, alive: Callable[[], bool]) -> None:
    """Return when the file at ``path`` appears or changes, or the process ends."""

    def stamp() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    before, deadline = stamp(), time.monotonic() + 120
    while stamp() == before and alive():
        assert time.monotonic() < deadline, f"no progress of process {process.pid}"
        time.sleep(0.002)


def test_killed_at_random_moments(recipe: Recipe, whole: Path, tmp_path: Path, outcome: Callable) -> None:
    seed = time.time_ns()
    print("seed of the delays:", seed)  # shown when the test fails
    delays, folder, kills = random.Random(seed), RunFolder(tmp_path / "run"), 0
    for _ in range(20):
        process = start(recipe, folder.path)
        for _ in range(delays.randint(1, 2)):
            wait_for_news(folder.checkpoint, process, process.is_alive)
        time.sleep(delays.uniform(0, 0.1))
        if kills < 4:
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if folder.result.exists():
            break
    assert kills >= 3
    assert outcome(folder.path) == outcome(whole)
    assert not list(folder.path.glob(".*"))


class Killed(BaseException):
    pass


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, Path, str, int], None]:
    """Train until just after the n-th file of a kind was written, and so before the next one was."""

    def run(recipe: Recipe, out: Path, place: str, count: int) -> None:
        function, left = getattr(engine, place), count

        def once_more(*args: object, **options: object) -> None:
            nonlocal left
            function(*args, **options)
            left -= 1
            if not left:
                raise Killed

        monkeypatch.setattr(engine, place, once_more)
        with pytest.raises(Killed):
            train(recipe, out, quiet=True)
        monkeypatch.undo()

    return run


@pytest.mark.parametrize(
    "place, count",
    [("write", 1), ("save_checkpoint", 1), ("save_checkpoint", 4), ("save_checkpoint", 9), ("write_metrics", 2)],
)
def test_killed_between_two_files(
    recipe: Recipe,
    whole: Path,
    tmp_path: Path,
    outcome: Callable,
    killed_after: Callable,
    place: str,
    count: int,
) -> None:
    quick = recipe.replace(**{"data.workers": 0, "train.tensorboard": False})
    killed_after(quick, tmp_path, place, count)
    train(quick, tmp_path, resume=True, quiet=True)
    assert outcome(tmp_path) == outcome(whole)


def test_goes_on_in_smaller_passes(recipe: Recipe, tmp_path: Path, killed_after: Callable) -> None:
    """As the message of a run that has no memory left advises."""
    killed_after(recipe, tmp_path, "save_checkpoint", 4)
    result = train(recipe.replace(**{"train.micro_batch": 4}), tmp_path, resume=True, quiet=True)
    steps = [row["step"] for row in csv.DictReader((result.folder / "metrics.csv").open())]
    assert steps == ["6", "12", "18"]


@pytest.mark.slow
def test_killed_command_line(recipe: Recipe, whole: Path, tmp_path: Path, outcome: Callable) -> None:
    path, folder = tmp_path / "recipe.toml", RunFolder(tmp_path / "run")
    path.write_text(recipe.to_toml())
    command = [sys.executable, "-m", "zoo", "train", str(path), "--out", str(folder.path), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.05):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for_news(folder.checkpoint, process, lambda process=process: process.poll() is None)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert outcome(folder.path) == outcome(whole)
