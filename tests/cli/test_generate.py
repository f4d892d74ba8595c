"""``zoo generate`` and its Python twin."""

import json
import re
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.analysis.depth import kind_of
from zoo.atomic import save_safetensors
from zoo.cli import main
from zoo.generation import load_writer
from zoo.pretrained.hub import write_repository

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
RECURSIVE = {"hidden_size": 48, "num_hidden_layers": 5, "intermediate_size": 64, "thresholds": (0.0, 0.4, 0.5)}


def write_model(path: Path, name: str, fields: dict[str, Any]) -> Path:
    """A small language model on bytes, in a file that says so."""
    torch.manual_seed(0)
    model = zoo.create_model(name, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    described = {"model": name, "tokenizer": "bytes", "licence": "mit", "config": json.dumps(fields)}
    save_safetensors(model.state_dict(), path, described)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.safetensors", "matmulfree_2m", SMALL)


@pytest.fixture(scope="module")
def recursive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("recursive") / "small.safetensors", "mor_2m_r3", RECURSIVE)


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


@pytest.mark.parametrize("sampling", [("--temperature", 0), ("--top-k", 20), ("--top-p", 0.7)], ids=str)
def test_a_batch_writes_what_each_prompt_does_alone(
    cli: Callable, recursive: Path, tmp_path: Path, sampling: tuple[object, ...]
) -> None:
    prompts = ["To be", "or not\u00fc to be", "that", "is the question"]
    batch = tmp_path / "prompts.txt"
    batch.write_text("\n".join(prompts[:3]) + "\n\n" + prompts[3] + "\n", encoding="utf-8")
    options = ("--max-new-tokens", 9, *sampling)
    alone = [
        json.loads(cli("generate", recursive, "--prompt", prompt, "--seed", 5 + i, *options, "--json")[1])
        for i, prompt in enumerate(prompts)
    ]
    code, together, _ = cli("generate", recursive, "--batch", batch, "--seed", 5, *options, "--json")
    assert code == 0
    assert json.loads(together) == alone
    assert len({each["text"] for each in alone}) == 4
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert cli("generate", recursive, "--batch", lines, "--seed", 5, *options, "--json")[1] == together


def test_depths_in_colour_and_as_a_picture(cli: Callable, recursive: Path, tmp_path: Path) -> None:
    options = ("--prompt", "Caf\u00e9 12,\nno", "--max-new-tokens", 6, "--seed", 1)
    picture = tmp_path / "depth.png"
    values = json.loads(cli("generate", recursive, *options, "--show-depth", "--plot-depth", picture, "--json")[1])
    assert "".join(values["pieces"]) == values["prompt"] + values["text"]
    assert values["pieces"][3:5] == ["", "\u00e9"]  # two bytes
    assert len(values["depths"]) == len(values["pieces"]) - 1  # nothing had to follow the last
    assert len(set(values["depths"])) > 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = cli("generate", recursive, *options, "--show-depth")[1]
    text, _, described = shown.removesuffix("\n").rpartition("\n")
    assert re.sub("\x1b\\[[0-9;]*m", "", text) == values["prompt"] + values["text"]
    assert described.endswith(f"mean {statistics.mean(values['depths']):.2f}")
    first = {1: 153, 2: 157, 3: 222}[values["depths"][0]]
    assert text.startswith(f"\x1b[38;5;16;48;5;{first}mC\x1b[0m")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch", "nowhere.txt"), "Cannot read prompts from nowhere.txt"),
        (("--batch", "empty.txt"), "empty.txt holds no prompt; expected one a line."),
        (("--batch", "bad.jsonl"), 'bad.jsonl, line 2: expected an object with "prompt"'),
        (("--batch", "bad.jsonl", "--prompt", "x"), "Expected either --prompt or --batch"),
        (("--show-depth", "--stream"), "--stream prints one text as it comes"),
        (
            ("--plot-depth", "x.jpeg", "--max-new-tokens", "2"),
            "x.jpeg is no picture; expected a name that ends in .png",
        ),
        (("--plot-depth", "nowhere/x.png"), "There is no folder nowhere for x.png"),
    ],
)
def test_mistakes_with_many(
    cli: Callable, recursive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n["b"]\n')
    code, _, error = cli("generate", recursive, *arguments)
    assert (code, len(error.splitlines())) == (2, 1)
    assert message in error


def test_a_model_without_depths(cli: Callable, file: Path) -> None:
    code, _, error = cli("generate", file, "--show-depth")
    assert code == 2
    assert "has no shared block; expected a Mixture-of-Recursions model" in error


def test_kinds_of_tokens() -> None:
    words = ["\n", " ", "W", "o", " is", "n't", "7", " 42", ",", "x1", "", " The"]
    kinds = [kind_of(piece, before) for before, piece in pairwise(["", *words])]
    start, rest = "start of a word", "rest of a word"
    expected = ["line break", "space", start, rest, start, "other", "number", "number", "punctuation", "other", "other"]
    assert kinds == [*expected, start]


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


@pytest.mark.parametrize("tag", ["zoo_cifar10", "r224_in1k"])  # the second would have to be fetched
def test_models_that_write_no_text(cli: Callable, tag: str) -> None:
    code, _, error = cli("generate", f"efficientvit_m0.{tag}")
    assert (code, len(error.splitlines())) == (2, 1)
    assert f"efficientvit_m0.{tag} writes no text; expected a language model" in error


def test_a_model_that_does_not_exist(cli: Callable) -> None:
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
