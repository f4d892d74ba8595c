"""Several processes give what one gives: same global batch, same samples in every step, on gloo.

The tolerance, 1e-4 of relative difference in losses after two epochs, is that of summing gradients in another order.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.train.engine import train
from zoo.train.recipe import Recipe

# A model in which the samples of a batch do not see each other, and one for text; both known only to these processes.
SCRIPT = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import zoo
from zoo.errors import ZooError
from plain_models import IMAGES, TEXT
for family in (IMAGES, TEXT):
    zoo.register(family)
from zoo.train.engine import train
recipe, out = zoo.load_recipe(sys.argv[1]), sys.argv[2]
# accelerate shares models out on GPUs and their like alone: the CPU passes for one
if recipe.train.sharding.startswith("zero") or "ACCELERATE_USE_DEEPSPEED" in os.environ:
    import deepspeed
    from accelerate.state import PartialState
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # C++ that it would build, and nothing here calls
    PartialState(cpu=True)
    del os.environ["ACCELERATE_USE_CPU"]
elif recipe.train.sharding:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
try:
    train(recipe, out, resume=True)
except ZooError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def start(group: Callable) -> Callable[[Recipe, Path, int], list[subprocess.Popen]]:
    """A function that trains a recipe into a folder in so many processes, in this environment and more."""

    def processes(recipe: Recipe, out: Path, world: int, **more: str) -> list[subprocess.Popen]:
        out.parent.mkdir(parents=True, exist_ok=True)
        path, script = out.with_suffix(".toml"), out.with_suffix(".py")
        path.write_text(recipe.to_toml())
        script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
        return [
            subprocess.Popen(
                [sys.executable, str(script), str(path), str(out)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for environment in group(world)
        ]

    return processes


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Wait; what each printed. All must have ended well."""
    printed = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
            printed.append(output)
    finally:
        for process in processes:
            process.kill()
    return printed


def rows_of(path: Path) -> list[dict[str, float]]:
    with (path / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_close(left: Path, right: Path) -> None:
    for one, other in zip(rows_of(left), rows_of(right), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def recipes(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """A batch of 8, of which no process takes more than 2 samples at once."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(120)))
    both = {"train.micro_batch": 2, "train.save_steps": 1, "train.ema": 0.5, "optim.clip": 1.0}
    return {
        "images": tiny_recipe(**both, **{"model.name": "plain_images", "model.overrides": {"img_size": 32}}),
        "text": tiny_recipe(
            **both,
            **{
                "task": "language-modelling",
                "model.name": "plain_text",
                "model.overrides": {},
                "data.name": str(text),
                "data.seq_len": 32,
            },
        ),
    }


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process: this one."""
    root = tmp_path_factory.mktemp("alone")
    for kind, recipe in recipes.items():
        train(recipe, root / kind, quiet=True)
    return {kind: root / kind for kind in recipes}


@pytest.mark.slow
@pytest.mark.parametrize("kind, world", [("text", 2), ("images", 4)])
def test_processes_together_equal_one(
    recipes: dict[str, Recipe], alone: dict[str, Path], start: Callable, tmp_path: Path, kind: str, world: int
) -> None:
    printed = finish(start(recipes[kind], tmp_path / "run", world))
    passes = 4 // world
    assert f"batch of 8 = {world} processes x 2 samples x {passes} passes" in printed[0]
    assert "batch of 8" not in printed[1]
    assert_close(tmp_path / "run", alone[kind])


def kill_when_saved(processes: list[subprocess.Popen], run: Path) -> None:
    """Kill all processes of a run as soon as it has a checkpoint."""
    wait_for(lambda: (run / "checkpoint.safetensors").exists(), processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, first, then",
    [
        ("images", ("fsdp2", 2), ("", 1)),
        ("text", ("fsdp2", 2), ("fsdp2", 2)),
        pytest.param("images", ("zero1", 2), ("zero1", 2), marks=needs_deepspeed),
        pytest.param("text", ("", 1), ("zero2", 2), marks=needs_deepspeed),
        pytest.param("images", ("zero3", 2), ("", 1), marks=needs_deepspeed),
        pytest.param("text", ("zero2", 2), ("zero3", 2), marks=needs_deepspeed),
    ],
)
def test_sharded_processes_equal_one(
    recipes: dict[str, Recipe],
    alone: dict[str, Path],
    start: Callable,
    tmp_path: Path,
    kind: str,
    first: tuple[str, int],
    then: tuple[str, int],
) -> None:
    """Killed once and gone on with, sharded or not, on as many processes or others: what is saved is whole."""
    for at, (sharding, world) in enumerate((first, then)):
        recipe = recipes[kind].replace(**{"train.sharding": sharding})
        processes = start(recipe, tmp_path / "run", world)
        if at == 0:
            kill_when_saved(processes, tmp_path / "run")
            assert not (tmp_path / "run" / "result.json").exists()
            environment = json.loads((tmp_path / "run" / "environment.json").read_text())
            assert environment["distributed"] == {"fsdp2": "FSDP", "": "NO"}.get(sharding, "DEEPSPEED")
        else:
            finish(processes)
    assert_close(tmp_path / "run", alone[kind])
    mine, theirs = (load_file(each / "model.safetensors") for each in (tmp_path / "run", alone[kind]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind, worlds", [("images", (2, 1)), ("text", (1, 2))])
def test_killed_and_resumed_on_other_processes(
    recipes: dict[str, Recipe],
    alone: dict[str, Path],
    start: Callable,
    tmp_path: Path,
    kind: str,
    worlds: tuple[int, int],
) -> None:
    processes = start(recipes[kind], tmp_path / "run", worlds[0])
    kill_when_saved(processes, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    finish(start(recipes[kind], tmp_path / "run", worlds[1]))
    assert_close(tmp_path / "run", alone[kind])


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(
    recipes: dict[str, Recipe], alone: dict[str, Path], start: Callable, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    recipe = recipes["images"].replace(**{"schedule.epochs": 2})
    processes = start(recipe, tmp_path / "run", 2)
    wait_for(lambda: checkpoint.exists(), processes)
    processes[-1].send_signal(signal.SIGTERM)  # one of them is enough
    printed = finish(processes)
    if "Stopped by SIGTERM" in printed[0]:  # it may have been about to end anyway
        assert "is saved, --resume auto goes on there." in printed[0]
        assert not (tmp_path / "run" / "result.json").exists()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert_close(tmp_path / "run", alone["images"])


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.002)
