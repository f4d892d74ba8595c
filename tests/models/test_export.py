"""Every image model as a program: torch.export, ONNX, TorchScript and torch.compile agree with it.

All variants go through torch.export; of each family the lightest goes through the rest, as the others differ in numbers
alone: ``pytest tests/models/test_export.py --every-variant`` takes them all.
"""

import warnings
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from variants import lightest_of_each_family

import zoo
from zoo.ops.selective_scan import onnx_decompositions

MODELS = zoo.list_models(task="image-classification")

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.function is test_export or metafunc.config.getoption("--every-variant")
    metafunc.parametrize("name", MODELS if every else lightest_of_each_family(MODELS))


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def export(model: nn.Module) -> torch.export.ExportedProgram:
    """With a free batch size; it is tested at one that it was not traced with."""
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))


def assert_agrees(ours: torch.Tensor, eager: torch.Tensor) -> None:
    assert_close(ours, eager, rtol=0.0, atol=1e-4 * max(1.0, eager.std().item()))


def test_export(name: str, randomise: Callable) -> None:
    model, x = randomise(zoo.create_model(name)), images(5)
    with torch.no_grad():
        assert_agrees(export(model).module()(x), model(x))


def test_onnx(name: str, randomise: Callable) -> None:
    model, x = randomise(zoo.create_model(name)), images(5)
    program = export(model).run_decompositions(onnx_decompositions())
    onnx = torch.onnx.export(program, verbose=False, optimize=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it cannot fold
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString(), options)
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_agrees(torch.from_numpy(ours), model(x))


def test_trace(name: str, randomise: Callable) -> None:
    model, x = randomise(zoo.create_model(name)), images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of branches on shapes
        assert_agrees(torch.jit.trace(model, x, check_trace=False)(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("fuse", [False, True])
def test_script_agrees_at_every_size(name: str, fuse: bool, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name))
    model = model.fuse() if fuse else model
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in [(128, 128), (96, 160)]:
            assert_close(scripted(images(1, *size)), model(images(1, *size)))


@pytest.mark.parametrize("fuse", [False, True])
def test_compiles_whole(name: str, fuse: bool, randomise: Callable) -> None:
    """In one graph: ``fullgraph`` makes a graph break an error."""
    model, x = randomise(zoo.create_model(name)), images()
    model = model.fuse() if fuse else model
    torch.compiler.reset()
    with torch.no_grad():
        assert_agrees(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
