"""What every test shares: no network, one thread, the shared folder and the golden cases."""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parents[1]

# Set before any test module imports torch. One thread per process: results do not depend on the machine's core count,
# and parallel workers do not fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the generated files that tests compare against"
    )
    parser.addoption("--kills", type=int, default=0, help="how often tests/train/test_kills.py kills each of its runs")
    parser.addoption(
        "--every-variant", action="store_true", help="export, trace and compile every variant, not one of each family"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Cut huggingface_hub off the network and off the user's cache, in this process and in those that tests start."""
    cache = tempfile.TemporaryDirectory(prefix="zoo-tests-")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", cache.name)
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        patch.delenv(variable, raising=False)
    patch.setenv("HF_HUB_OFFLINE", "1")
    config.add_cleanup(cache.cleanup)
    config.add_cleanup(patch.undo)


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether ``--update-golden`` was given."""
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the repository: golden cases and sample data. CI always has it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail("no ../shared folder, and CI must have it")
        pytest.skip("needs the ../shared folder")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> ModuleType:
    """``shared/golden/golden.py``: rebuilds the weights and inputs of a golden case and loads its outputs."""
    spec = importlib.util.spec_from_file_location("golden", shared / "golden" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def randomise() -> "Callable[[nn.Module], nn.Module]":
    """A function that gives a model weights under which every layer counts; a fresh one has residual branches of zero.

    An image model's batch norms then take their statistics from noise, or activations would vanish with the depth, and
    with them whatever a test could find: logits would hardly depend on the input. Seeded; in eval mode afterwards.
    """
    import torch
    from torch import nn

    from zoo.config import ImageConfig

    generator = torch.Generator()

    def normal_(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator).clamp(-3, 3))

    def take_statistics(model: nn.Module, channels: int) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all calls: over this one
        noise = torch.randn(8, channels, 128, 128, generator=generator)
        model.train()(noise.to(next(model.parameters())))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()

    @torch.no_grad()
    def fill(model: nn.Module) -> nn.Module:
        generator.manual_seed(0)
        for name, tensor in model.state_dict().items():
            if name.endswith("attention_biases"):
                normal_(tensor, 0.0, 0.5)
            elif name.endswith("running_var"):
                normal_(tensor, 1.0, 0.2)
            elif name.endswith("weight") and tensor.ndim == 1:
                normal_(tensor, 0.2, 0.05)  # far below 1, or deep residual networks blow rounding errors up
            elif tensor.ndim <= 1 and tensor.is_floating_point():
                normal_(tensor, 0.0, 0.1)
            elif tensor.is_floating_point():
                normal_(tensor, 0.0, tensor[0].numel() ** -0.5)
        config = getattr(model, "config", None)
        if isinstance(config, ImageConfig):
            take_statistics(model, config.in_chans)
        return model.eval()

    return fill


@pytest.fixture(scope="session")
def initialised_again() -> "Callable[[Any], Any]":
    """A function that builds a model's twin on the meta device, where nothing is initialised, and initialises it."""
    import torch

    import zoo

    def build(model: Any) -> Any:
        again: Any = zoo.build(model.config, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*again.parameters(), *again.buffers()]:
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        again.init_weights()
        return again

    return build


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy pictures of 40 x 32 pixels in the class folders ``blue``, ``green`` and ``red``."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 128, (32, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_recipe(class_folder: Path) -> Callable[..., Any]:
    """Makes recipes for a small EfficientViT on ``class_folder``: ``tiny_recipe(**{"optim.lr": 1e-3})``.

    48 pictures to train on and 12 held out; 6 steps in an epoch.
    """
    from zoo.train.recipe import Recipe, resolve

    sizes = {"depths": [1, 1, 1], "widths": [16, 24, 32], "num_heads": [2, 2, 2], "img_size": 32}
    base = resolve(
        {
            "model": {"name": "efficientvit_m0", "overrides": sizes},
            "data": {"name": str(class_folder), "holdout": 0.2, "workers": 0},
            "augment": {"scale": [0.5, 1.0]},
            "optim": {"lr": 2e-3},
            "schedule": {"epochs": 2},
            "train": {"batch_size": 8, "tensorboard": False},
        },
        "tiny",
    )

    def make(**changes: Any) -> Recipe:
        return base.replace(**changes)

    return make


@pytest.fixture(scope="session")
def changed_in_an_epoch() -> Callable[[Any], set[str]]:
    """A function that makes the steps of a fresh run's first epoch; returns which parameters and buffers changed."""

    def steps(run: Any) -> set[str]:
        before = {name: tensor.clone() for name, tensor in run.plain_model.state_dict().items()}
        run._train_epoch()
        return {name for name, tensor in run.plain_model.state_dict().items() if (tensor != before[name]).any()}

    return steps
