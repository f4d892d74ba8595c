"""Pictures with several labels each, from the manifest to a prediction."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from zoo.cli import app
from zoo.data.image import EvalTransform, Normalise, read_image
from zoo.data.pack import pack_pictures
from zoo.data.sources import Relabelled, missing_classes, open_source, stratified_holdout
from zoo.errors import DataError, RecipeError
from zoo.inference import load_classifier
from zoo.pretrained.hub import write_repository
from zoo.train.automatic import finetune_recipe
from zoo.train.engine import train
from zoo.train.evaluate import evaluate_run
from zoo.train.recipe import Loss
from zoo.train.report import FIGURES
from zoo.train.scoring import MultiLabelScoring, average_precision, f1_score
from zoo.train.tasks import ImageClassification, LabelsLoss

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 noisy pictures that are any of red, green and blue, or none; blue is rare. The labels are in a CSV file."""
    root = tmp_path_factory.mktemp("several")
    generator = np.random.default_rng(0)
    lines = ["path,labels"]
    for i in range(80):
        here = generator.random(3) < (0.5, 0.4, 0.2)
        pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        pixels += (127 * here).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(f"{i}.png,{'|'.join(np.asarray(('red', 'green', 'blue'))[here])}")
    (root / "pictures.csv").write_text("\n".join(lines) + "\n")
    return root / "pictures.csv"


@pytest.fixture(scope="module")
def make(tiny_recipe: Callable, manifest: Path) -> Callable:
    values = {"data.name": str(manifest), "loss.name": "bce", "loss.class_weights": True, "augment.hflip": 0.0}
    return lambda **changes: tiny_recipe(**{**values, "optim.lr": 5e-3, "schedule.epochs": 4, **changes})


@pytest.fixture(scope="module")
def run(make: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make(), tmp_path_factory.mktemp("run") / "run", quiet=True).folder


def test_manifests_and_shards_with_several_labels(manifest: Path, tmp_path: Path) -> None:
    source = open_source(str(manifest))
    assert (source.classes, source.labels.shape, source.labels.dtype) == (CLASSES, (80, 3), bool)
    rows = [line.split(",")[1] for line in manifest.read_text().splitlines()[1:]]
    assert [set(source.class_names_of(i)) for i in range(80)] == [set(filter(None, row.split("|"))) for row in rows]

    listed = manifest.with_name("pictures.jsonl")
    listed.write_text(
        "".join(json.dumps({"path": "0.png", "labels": row.split("|") if row else []}) + "\n" for row in rows)
    )
    assert np.array_equal(open_source(str(listed)).labels, source.labels)

    pack_pictures(source, tmp_path / "shards", "train", per_shard=30)
    packed = open_source(str(tmp_path / "shards"))
    assert packed.classes == CLASSES
    assert np.array_equal(packed.labels, source.labels)

    other = Relabelled(source, ("green", "blue", "grey", "red"), "val")
    assert np.array_equal(other.labels[:, [1, 0, 3]], source.labels)
    assert missing_classes(other.labels, other.classes) == ["grey"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "path,labels\n1.png,\n", r"gives no picture a label.$"),
        (
            "a.jsonl",
            '{"path": "1.png", "labels": {"cat": 1}}',
            r"row 1 has \{'cat': 1\} for its labels; expected a list",
        ),
        ("a.jsonl", '{"path": "1.png", "label": ["cat"]}', r"has a list for its label; .* in a column 'labels'.$"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / name))


def test_holding_out_keeps_the_shares_of_classes_that_come_together() -> None:
    generator = np.random.default_rng(1)
    labels = generator.random((2000, 6)) < (0.5, 0.3, 0.1, 0.02, 0.005, 0.4)
    labels[:, 5] |= labels[:, 3]
    kept, held = stratified_holdout(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(2000))
    shares = labels[held].sum(0) / labels.sum(0)
    assert abs(shares - 0.2).max() < 0.05
    assert abs((~labels[held].any(1)).sum() / (~labels.any(1)).sum() - 0.2) < 0.05


def plain_average_precision(scores: list[float], truth: list[bool]) -> float:
    """By the definition: over all thresholds, precision times the rise of recall."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [yes for score, yes in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(taken) / sum(truth)
        total += sum(taken) / len(taken) * (recall - before)
        before = recall
    return total


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_is_the_definitions(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (50, 4), generator=generator).float()
    truth = torch.rand(50, 4, generator=generator) < 0.3
    truth[:, 3] = False
    found = average_precision(scores, truth)
    expected = [plain_average_precision(scores[:, i].tolist(), truth[:, i].tolist()) for i in range(3)]
    assert found[:3].tolist() == pytest.approx(expected)
    assert found[3].isnan()
    assert average_precision(truth.float(), truth)[:3].tolist() == [1, 1, 1]


def test_f1_counts_what_is_found_and_what_is_not() -> None:
    answers = torch.tensor([[True, False], [True, False], [False, False]])
    truth = torch.tensor([[True, False], [False, False], [True, False]])
    assert float(f1_score(answers, truth)) == 0.5
    assert f1_score(answers, truth, 0).tolist() == [0.5, 0.0]


def test_rare_labels_weigh_more(make: Callable) -> None:
    loss = LabelsLoss(Loss(name="bce"), 0.2, torch.tensor([1.0, 4.0]))
    logits, targets = torch.tensor([[0.5, -2.0]]), torch.tensor([[False, True]])
    yes, no = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    wanted = -(0.1 * yes[0, 0] + 0.9 * no[0, 0] + 4 * 0.9 * yes[0, 1] + 0.1 * no[0, 1]) / 2
    assert torch.allclose(loss(logits, targets), wanted)

    task = ImageClassification(make())
    labels = task.source.labels[task.train_indices]  # type: ignore[union-attr]
    weights: Tensor = task.labels_loss.weights  # type: ignore[assignment]
    assert np.allclose(weights, (~labels).sum(0) / labels.sum(0))


def test_the_labels_are_learned_and_told(run: Path, manifest: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())["metrics"]
    assert set(result) == {"loss", "map", "f1"}
    assert result["map"] > 75  # by chance: the classes' shares, 50, 40 and 20 %
    assert {name: value for name, value in evaluate_run(run).items() if name in result} == pytest.approx(result)
    assert "mAP" in CliRunner().invoke(app, ["eval", str(run)]).output
    page = (run / "report.html").read_text()
    assert "Each class of the held-out part" in page
    assert f"mAP {result['map']:.2f} %" in page
    assert "map" in FIGURES

    classifier = load_classifier(run)
    assert classifier.multi_label
    picture = manifest.with_name("0.png")
    inputs = Normalise(classifier.preprocessing)(EvalTransform(classifier.preprocessing)(read_image(picture))[None])
    with torch.no_grad():
        probabilities = classifier.model(inputs)[0].sigmoid()  # not shares of one whole
    answer = classifier.predict([picture])[0]
    assert dict(answer) == pytest.approx(dict(zip(CLASSES, probabilities.tolist(), strict=True)))
    said = CliRunner().invoke(app, ["predict", str(picture), "--model", str(run)]).output
    assert said.count("(yes)") == (probabilities >= 0.5).sum()

    write_repository(f"local-dir:{run}", tmp_path / "repository", licence="mit")
    pushed = load_classifier(f"local-dir:{tmp_path / 'repository'}")
    assert (pushed.multi_label, pushed.labels) == (True, CLASSES)
    assert dict(pushed.predict([picture])[0]) == pytest.approx(dict(answer))


def test_processes_of_different_shares_score_as_one(run: Path) -> None:
    scoring = MultiLabelScoring(load_classifier(run).preprocessing, channels_last=False)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 30, 3, generator=generator)
    scores[1] = (scores[1] > 0.3).float()
    accelerator = Accelerator(cpu=True)
    assert scoring.figures([scores[:, :8], scores[:, 8:9], scores[:, 9:]], accelerator) == scoring.figures(
        [scores], accelerator
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss.name": "ce"}, r"has several labels a picture, but loss.name is 'ce'; expected 'bce'.$"),
        ({"augment.mixup": 0.2}, r"but augment.mixup and augment.cutmix mix single labels; expected 0.$"),
        ({"distill.teacher": "efficientvit_m0"}, r"but distill.kind is 'soft'; expected 'feature'"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ImageClassification(make(**changes))


def test_one_label_and_several_do_not_mix(run: Path, class_folder: Path) -> None:
    with pytest.raises(DataError, match=r"has one label a picture; expected several labels, as in training.$"):
        evaluate_run(run, split="train", root=str(class_folder))


def test_a_recipe_is_made_without_one(manifest: Path) -> None:
    choice = finetune_recipe("efficientvit_m0.zoo_cifar10", str(manifest))
    recipe = choice.recipe
    assert (recipe.loss.name, recipe.loss.class_weights, recipe.augment.smoothing) == ("bce", True, 0)
    assert any("labels a picture" in note for note in choice.notes)
