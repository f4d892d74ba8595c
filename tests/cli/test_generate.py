"""``zoo generate`` and its Python twin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.atomic import save_safetensors
from zoo.cli import main
from zoo.generation import load_writer
from zoo.pretrained.hub import write_repository

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model on bytes, in a file that says so."""
    torch.manual_seed(0)
    model = zoo.create_model("matmulfree_2m", **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    described = {"model": "matmulfree_2m", "tokenizer": "bytes", "licence": "mit", "config": json.dumps(SMALL)}
    save_safetensors(model.state_dict(), path, described)
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_generate(cli: Callable, file: Path) -> None:
    options = ("--prompt", "To be", "--max-new-tokens", 12, "--seed", 1)
    code, plain, _ = cli("generate", file, *options)
    assert code == 0
    assert plain.startswith("To be")
    assert cli("generate", file, *options, "--stream")[1] == plain
    values = json.loads(cli("generate", file, *options, "--json")[1])
    assert values["prompt"] + values["text"] + "\n" == plain
    assert cli("generate", file, *options[:-1], 2)[1] != plain
    greedy = [cli("generate", file, *options[:4], "--temperature", 0)[1] for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_packed_weights_write_the_same_text(cli: Callable, file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    assert cli("weights", "pack", file, "--out", packed)[0] == 0
    options = ("--prompt", "To be", "--max-new-tokens", 12, "--seed", 1)
    assert cli("generate", packed, *options)[1] == cli("generate", file, *options)[1]


def test_an_empty_prompt_begins_a_document(file: Path) -> None:
    writer = load_writer(file)
    drawn = torch.get_rng_state()
    pieces: list[str] = []
    text = writer.write("", max_new_tokens=20, seed=0, on_text=pieces.append)
    assert "".join(pieces) == text
    assert torch.equal(torch.get_rng_state(), drawn)
    long = writer.write("x" * 700, max_new_tokens=2, temperature=0)  # more than it was trained on
    assert writer.tokenizer.encode([long])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--top-p", "0"), "top_p is 0; expected more than 0, at most 1."),
        (("--tokenizer", "nonsense.json"), "No tokenizer 'nonsense.json'"),
        (("--device", "cuda:99"), "Device 'cuda:99' cannot be used here"),
    ],
)
def test_mistakes(cli: Callable, file: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = cli("generate", file, *arguments)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_models_that_write_no_text(cli: Callable) -> None:
    code, _, error = cli("generate", "efficientvit_m0.zoo_cifar10")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "efficientvit_m0.zoo_cifar10 writes no text; expected a language model" in error
    assert "Did you mean: matmulfree_2m" in cli("generate", "matmulfre_2m")[2]


def test_a_repository_for_transformers(file: Path, tmp_path: Path) -> None:
    """What `zoo weights push` uploads: transformers loads model and tokenizer, and zoo too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_repository(str(file), tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(["To be", "or not to be"], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= 15
    writer = load_writer(tmp_path)
    expected = load_writer(file).write("To be", max_new_tokens=5, temperature=0)
    assert writer.write("To be", max_new_tokens=5, temperature=0) == expected
    assert "pipeline_tag: text-generation" in (tmp_path / "README.md").read_text()
