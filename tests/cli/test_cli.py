"""The ``zoo`` command: what it prints, and one line with an exit code for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import zoo
from zoo.cli import main
from zoo.train.recipe import Recipe, load_recipe


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs the command in this process, as the console script does."""

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(int(caught.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a recipe that trains in a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(tiny_recipe(**{"schedule.epochs": 1}).to_toml())
    return path


@pytest.fixture(scope="module")
def run(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder, with brackets in its name."""
    from zoo.train.engine import train

    return train(tiny_recipe(**{"schedule.epochs": 1}), tmp_path_factory.mktemp("runs") / "run [1]", quiet=True).folder


def assert_one_line(answer: Answer, start: str, *, code: int = 2) -> None:
    assert answer.code == code, answer
    assert answer.err.startswith(f"zoo: {start}"), answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err


# Printing.


def test_list_is_a_table(cli: Callable) -> None:
    answer = cli("list", "efficientvit_m[01]")
    header, *rows = answer.out.splitlines()
    assert answer.code == 0
    assert answer.err == ""
    assert re.split(r"\s{2,}", header.strip()) == ["model", "params (M)", "MACs (M)", "px", "top-1 (%)", "weights"]
    assert [row.split()[0] for row in rows] == ["efficientvit_m0", "efficientvit_m1"]
    assert "r224_in1k" in rows[0]


def test_list_as_json_has_the_same_models(cli: Callable) -> None:
    rows = json.loads(cli("list", "--json").out)
    assert [row["name"] for row in rows] == zoo.list_models()
    first = next(row for row in rows if row["name"] == "efficientvit_m0")
    assert first["params"] == 2_349_436
    assert first["top1"] == 63.2
    names = [row["name"] for row in json.loads(cli("list", "efficientvit*", "--pretrained", "--json").out)]
    assert names == zoo.list_models("efficientvit*", pretrained=True)


def test_a_list_without_a_match_names_the_nearest(cli: Callable) -> None:
    assert_one_line(
        cli("list", "efficientvit_n0*"), "No model matches 'efficientvit_n0*'. Did you mean: efficientvit_m"
    )
    assert_one_line(
        cli("list", "--task", "detection"), "No model is for task 'detection'; expected image-classification"
    )


@pytest.mark.parametrize("name", ["efficientvit_m4", "efficientvit_m0.r224_in1k"])
def test_info_is_the_models_card(cli: Callable, name: str) -> None:
    answer = cli("info", name)
    assert answer.code == 0
    for fact in (name, "arXiv:2305.07027", "MMACs", "licence mit", "224 x 224 px, crop 0.875, bicubic"):
        assert fact in answer.out
    card = json.loads(cli("info", name, "--json").out)
    assert card["config"] == json.loads(json.dumps(zoo.get_config(name).to_dict()))
    assert card["costs"]["params"] > 2_000_000


def test_info_of_an_unknown_name(cli: Callable) -> None:
    assert_one_line(cli("info", "efficientvit_n4"), "Unknown model 'efficientvit_n4'. Did you mean: efficientvit_m4, ")
    assert_one_line(
        cli("info", "efficientvit_m4.nope"), "efficientvit_m4 has no weights tagged 'nope'; it has: r224_in1k"
    )


def test_version_and_help(cli: Callable) -> None:
    assert cli("--version").out == f"{zoo.__version__}\n"
    assert all(verb in cli("--help").out for verb in ("list", "info", "predict", "train", "finetune", "eval"))


# Predicting.


def test_predict_prints_the_likeliest_classes_first(cli: Callable, run: Path) -> None:
    answer = cli("predict", run / "sample.png", "--model", run, "--top", 2)
    name, header, *rows = answer.out.splitlines()
    assert answer.code == 0
    assert name == str(run / "sample.png")
    assert header.split() == ["%", "class"]
    shares = [float(row.split()[0]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert {row.split()[1] for row in rows} < {"blue", "green", "red"}


def test_predict_as_json_covers_every_picture(cli: Callable, run: Path, class_folder: Path) -> None:
    pictures = sorted(class_folder.rglob("*.png")) + [run / "sample.png"] * 10  # more than one batch
    rows = json.loads(cli("predict", *pictures, "--model", run, "--json").out)
    assert [row["picture"] for row in rows] == [str(picture) for picture in pictures]
    for row in rows:
        assert {entry["label"] for entry in row["classes"]} == {"blue", "green", "red"}
        assert sum(entry["probability"] for entry in row["classes"]) == pytest.approx(1)


def test_predict_with_names_that_look_like_markup(cli: Callable, run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "[bold]x[-bold].png"
    picture.write_bytes((run / "sample.png").read_bytes())
    assert cli("predict", picture, "--model", run).out.splitlines()[0] == str(picture)


def test_predict_with_packaged_weights(cli: Callable, class_folder: Path) -> None:
    answer = cli("predict", class_folder / "red" / "00.png", "--model", "efficientvit_m0.zoo_cifar10", "--json")
    [row] = json.loads(answer.out)
    assert len(row["classes"]) == 5
    assert {entry["label"] for entry in row["classes"]} < set(zoo.get_weights("efficientvit_m0.zoo_cifar10").labels)


@pytest.mark.parametrize(
    "content, start",
    [
        (b"", "{} is empty; expected a picture."),
        (b"no picture", "{} is not a picture of any format that Pillow reads."),
        (None, "Cannot read picture '{}': No such file or directory."),
    ],
)
def test_predict_on_a_bad_picture(cli: Callable, run: Path, tmp_path: Path, content: bytes | None, start: str) -> None:
    picture = tmp_path / "bad.png"
    if content is not None:
        picture.write_bytes(content)
    answer = cli("predict", picture, "--model", run)
    assert_one_line(answer, start.format(picture))
    assert answer.out == ""


def test_predict_with_a_bad_model(cli: Callable, run: Path, tmp_path: Path) -> None:
    def predict(model: object, *options: str) -> Answer:
        return cli("predict", run / "sample.png", "--model", model, *options)

    assert_one_line(predict("efficientvit_n0"), "Unknown model 'efficientvit_n0'. Did you mean: efficientvit_m0, ")
    assert_one_line(predict("efficientvit_m0.nope"), "efficientvit_m0 has no weights tagged 'nope'; it has: ")
    assert_one_line(predict("runs/nowhere"), "No run folder 'runs/nowhere'; expected one, or the name of a model")
    assert_one_line(predict(tmp_path), f"{tmp_path} is not a run folder: it has no config.json.")
    assert_one_line(predict(run, "--device", "gpu"), "Device 'gpu' cannot be used here: ")
    assert_one_line(predict("efficientvit_m0.r224_in1k"), "Cannot fetch model.safetensors from the Hub ")


# Training.


# A command line that makes no sense is told so as any other mistake is.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train quickstart --resume atuo", "--resume is 'atuo'; expected auto or never. Did you mean: auto?"),
        ("finetune efficientvit_m0 --data x --resume yes", "--resume is 'yes'; expected auto or never."),
        (
            "train quickstart --resme auto",
            "`zoo train` has no option --resme. Did you mean: --resume? `zoo train --help`",
        ),
        ("bench tinynet_e --no-fsue", "`zoo bench` has no option --no-fsue. Did you mean: --no-fuse"),
        ("train", "Missing argument 'recipe': A TOML file, or the name of a recipe that zoo ships. `zoo train --help`"),
        ("recipes diff quickstart", "Missing argument 'right': Another one"),
        ("bench tinynet_e --threads x", "Invalid value for '--threads'"),
        ("bench tinynet_e --threads 0", "Invalid value for '--threads'"),
        ("train quickstart --out", "Option '--out' requires an argument."),
        ("trian quickstart", "No such command 'trian'."),
        ("recipes shwo", "No such command 'shwo'."),
        ("recipes diff a b c", "Got unexpected extra argument"),
    ],
)
def test_a_command_line_that_makes_no_sense(cli: Callable, arguments: str, line: str) -> None:
    answer = cli(*arguments.split())
    assert_one_line(answer, line)
    assert answer.out == ""


def test_without_a_verb_the_help_is_all_there_is(cli: Callable) -> None:
    answer = cli("recipes")
    assert "Usage: zoo recipes" in answer.out + answer.err
    assert "zoo: " not in answer.err


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_show_prints_the_recipe_that_would_run(cli: Callable, tmp_path: Path, verb: str) -> None:
    changes = ("optim.lr=0.25", "data.root=/some place", "augment.scale=[0.5, 1]")
    answer = cli(verb, "quickstart", *changes, "--show")
    assert answer.code == 0
    (tmp_path / "shown.toml").write_text(answer.out)
    shown = load_recipe(tmp_path / "shown.toml")
    assert shown == load_recipe("quickstart", changes)
    assert tomllib.loads(answer.out)["optim"]["lr"] == 0.25


def test_train_evaluate_predict(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run [2]"
    trained = cli("train", recipe, "optim.lr=1e-3", "--out", out)
    assert (trained.code, trained.err) == (0, "")
    assert trained.out.startswith("epoch 1/1  loss ")
    assert f"Weights, curves and metrics are in {out}." in trained.out
    assert f"zoo eval '{out}'" in trained.out
    assert load_recipe(out / "recipe.toml").optim.lr == 1e-3

    figures = json.loads(cli("eval", out, "--json").out)
    result = json.loads((out / "result.json").read_text())
    assert figures == {"split": "heldout", "samples": 12, **result["metrics"]}
    words = cli("eval", out).out
    assert words.startswith(f"{out}, heldout: top-1 {figures['top1']:.2f} %, top-5 100.00 %, loss ")
    assert words.endswith(" on 12 pictures\n")

    again = cli("train", recipe, "optim.lr=1e-3", "--out", out)
    assert_one_line(again, f"{out} holds a run already; pass --resume auto to continue it, or another --out.")
    other = cli("train", recipe, "optim.lr=1e-4", "--out", out, "--resume", "auto")
    assert_one_line(other, f"{out} holds a run of another recipe: optim.lr was 0.001, is 0.0001. Choose another --out.")
    assert cli("train", recipe, "optim.lr=1e-3", "--out", out, "--resume", "auto").code == 0


def test_finetune_beside_the_same_from_scratch(
    cli: Callable, recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = (f"model.checkpoint={run / 'model.safetensors'}", "train.from_scratch=true")
    answer = cli("finetune", recipe, *changes)
    assert answer.code == 0
    rows = [line.split()[:2] for line in answer.out.splitlines() if line.startswith(("this run", "from scratch"))]
    assert rows == [["this", "run"], ["from", "scratch"]]
    assert (tmp_path / "runs" / "tiny" / "from_scratch" / "result.json").exists()


@pytest.mark.parametrize(
    "arguments, start",
    [
        (["quikstart"], "No recipe 'quikstart': neither a file nor a name. Nearest: quickstart"),
        (["quickstart", "optim.lrr=1"], "/"),
        (["quickstart", "optim.lr"], "Override 'optim.lr': expected section.key=value, such as optim.lr=1e-3."),
        (["RECIPE", "data.name=digitz"], "Unknown data set 'digitz'. Did you mean: digits?"),
        (["RECIPE", "data.name=owner/name"], "Cannot load data set 'owner/name', split 'train': "),
        (["RECIPE", "model.name=efficientvit_n0"], "Unknown model 'efficientvit_n0'. Did you mean: efficientvit_m0"),
        (["RECIPE", "model.overrides.num_classes=2"], "/"),
        (["RECIPE", "--out", "RECIPE"], "Cannot make the run folder "),
    ],
)
def test_a_training_that_cannot_start(
    cli: Callable, recipe: Path, tmp_path: Path, arguments: list[str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cli("train", *(str(recipe) if argument == "RECIPE" else argument for argument in arguments))
    assert_one_line(answer, start)
    assert answer.out == ""


def test_a_loss_that_is_not_finite_is_a_failure_not_a_mistake(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    changes = ("optim.name=sgd", "optim.lr=1e10", "schedule.warmup_lr=1e10")
    assert_one_line(cli("train", recipe, *changes, "--out", tmp_path / "run"), "The loss is ", code=1)


def test_an_interrupt_says_how_to_go_on(
    cli: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.train.engine._Run.run", interrupt)
    answer = cli("train", recipe, "--out", tmp_path / "run")
    assert_one_line(answer, f"interrupted; with --resume auto the same command continues {tmp_path / 'run'}.", code=130)


@pytest.mark.parametrize("verb, why", [("train", "Training"), ("eval", "Evaluating a run")])
def test_a_missing_package_names_its_extra(
    cli: Callable, recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch, verb: str, why: str
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    answer = cli(verb, run if verb == "eval" else recipe)
    assert_one_line(answer, f'{why} needs accelerate: pip install "efficient-zoo[train]"')


def test_evaluating_what_is_no_run(cli: Callable, tmp_path: Path) -> None:
    assert_one_line(cli("eval", tmp_path), f"{tmp_path} is not a run folder: it has no config.json.")


# As a process.


def start(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
        # A shell that starts these tests in the background has them, and so their children, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "arguments, code, err",
    [
        (["list", "efficientvit*"], 0, ""),
        (["list", "nothing*"], 2, "zoo: No model matches 'nothing*'.\n"),
        (["train", "quickstart", "optim.lr=x", "--show"], 2, r"zoo: .*optim.lr is 'x', expected a number.\n"),
    ],
)
def test_a_process_exits_with_one_line_at_most(arguments: list[str], code: int, err: str) -> None:
    process = start(*arguments)
    out, found = process.communicate(timeout=120)
    assert process.returncode == code, found
    assert re.fullmatch(err.replace("*'", r"\*'"), found)
    assert "\x1b" not in out


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("zoo")
    if not script.exists():
        pytest.skip("zoo runs from its sources, not installed")
    answer = subprocess.run([script, "list", "--json", "efficientvit_m0"], capture_output=True, text=True, check=True)
    assert [row["name"] for row in json.loads(answer.stdout)] == ["efficientvit_m0"]


@pytest.mark.slow
def test_a_real_interrupt_ends_with_one_line(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("train", recipe, "schedule.epochs=1000", "data.workers=1", "--out", out)
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        130,
        f"zoo: interrupted; with --resume auto the same command continues {out}.\n",
    )


@pytest.mark.slow
def test_train_and_predict_as_processes_write_no_escape_codes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for arguments in (("train", recipe, "--out", out), ("predict", out / "sample.png", "--model", out)):
        process = start(*arguments, environment={"NO_COLOR": "1"})
        printed, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert printed
        assert "\x1b" not in printed


def test_a_resolved_recipe_is_checked_again_when_it_comes_from_python(tiny_recipe: Callable) -> None:
    recipe: Recipe = tiny_recipe()
    with pytest.raises(zoo.RecipeError, match=r"unknown key optim.lrr"):
        recipe.replace(**{"optim.lrr": 1.0})
