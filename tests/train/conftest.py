"""What the tests of training share."""

import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import zoo
from zoo.train.run_folder import RunFolder


@pytest.fixture(scope="session", autouse=True)
def _plain_models() -> None:
    """Registers ``plain_images`` and ``plain_text``, in which the samples of a batch do not see each other."""
    spec = importlib.util.spec_from_file_location("plain_models", Path(__file__).with_name("plain_models.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for family in (module.IMAGES, module.TEXT):
        zoo.register(family)


class Outcome:
    """All of a run that must not depend on how often it was interrupted."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(path)
        self.metrics = folder.metrics.read_text()
        self.result = json.loads(folder.result.read_text()) | {"seconds": 0}
        self.weights, _ = read(folder.weights)
        self.checkpoint, metadata = read(folder.checkpoint)
        self.progress = json.loads(metadata["zoo_progress"]) | {"seconds": 0}
        self.groups = metadata["zoo_groups"]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        mine, theirs = vars(self) | {}, vars(other) | {}
        for tensors in ("weights", "checkpoint"):
            left, right = mine.pop(tensors), theirs.pop(tensors)
            assert left.keys() == right.keys()
            assert [name for name in left if not same(left[name], right[name])] == []
        assert mine == theirs
        return True


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit, NaN to NaN."""
    return left.shape == right.shape and bool(torch.all((left == right) | (left.isnan() & right.isnan())))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 -- not a mapping


@pytest.fixture
def group() -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of processes to the environments in which they find each other, as torchrun sets them.

    On the CPU, with gloo; one process is alone and needs none.
    """

    def environments(world: int) -> list[dict[str, str]]:
        if world == 1:
            return [{}]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]

    return environments


@pytest.fixture
def outcome() -> type[Outcome]:
    """``outcome(path)``: what a finished run folder holds, to be compared to the last bit."""
    return Outcome
