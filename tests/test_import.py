"""What an import loads, in a fresh process: the budget that keeps ``import zoo`` and ``zoo list`` quick."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.ops._dispatch import constant_when_traced

HEAVY = {"torch", "torchvision", "timm", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
HEAVY |= {"rich", "typer"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after running ``code``, which may print."""
    report = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo; zoo.list_models()",
        "import zoo; zoo.list_models('efficientvit*', task='image-classification')",
        "import zoo; zoo.list_models(pretrained=True)",
        "import zoo; zoo.is_model('efficientvit_m0')",
        "import zoo; zoo.ImageConfig(num_classes=3)",
        "import zoo; [zoo.get_config(name) for name in zoo.list_models()]",
        "import zoo; zoo.get_config('mor_2m_r3').override(capacities=(1.0, 0.5, 0.25))",
    ],
)
def test_loads_nothing_heavy(code: str) -> None:
    loaded = loaded_by(code)
    assert "zoo" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "list --pretrained",
        "info efficientvit_m5",
        "info mor_2m_r3 --json",
        "recipes list",
        "recipes show quickstart",
        "recipes check",
        "recipes diff quickstart lm/mor_360m_r4_expert",
        "recipes copy quickstart",
        "train quickstart --show",
        "finetune finetune/full --show",
    ],
)
def test_a_command_that_builds_nothing_loads_no_torch(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(zoo.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    loaded = loaded_by(f"from zoo.cli import app; app({command.split()}, standalone_mode=False)")
    assert "typer" in loaded
    assert not loaded & {"torch", "torchvision", "timm", "transformers", "accelerate", "numpy"}


def test_creating_a_model_loads_no_timm() -> None:
    loaded = loaded_by("import zoo; zoo.create_model('efficientvit_m0')")
    assert "torch" in loaded
    assert not loaded & {"timm", "torchvision"}


def test_creating_a_model_loads_no_compiler() -> None:
    code = "import zoo; zoo.create_model('efficientvit_m0'); import sys; assert 'torch._dynamo' not in sys.modules"
    assert "torch" in loaded_by(code)

    def function() -> str:
        return ""

    ours = vars(constant_when_traced(function)).copy()
    function.__dict__.clear()
    assert vars(torch.compiler.assume_constant_result(function)) == ours


def test_every_public_name_is_there() -> None:
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
        assert name in dir(zoo)
    assert set(zoo._PUBLIC) == set(zoo.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        zoo.creat_model  # noqa: B018
