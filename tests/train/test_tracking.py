"""Weights & Biases: the real package, offline, so that what would be sent lies in a file of the run folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo.errors import TrainingError
from zoo.train.engine import train

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No login, settings or caches of the user's, or of another test."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for variable in ("HOME", "XDG_CONFIG_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_every_epoch_is_logged_and_a_resumed_run_is_the_same(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = tiny_recipe(**{"train.wandb": "pictures", "train.tensorboard": True, "optim.lr": 0.00123})
    train(recipe, tmp_path / "run", quiet=True)
    name = json.loads((tmp_path / "run" / "manifest.json").read_text())["id"]
    (log,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    logged = log.read_bytes()
    for expected in (b"pictures", b"0.00123", b"train_loss", b"val_top1"):  # project, config and figures
        assert expected in logged
    assert list((tmp_path / "run" / "tensorboard").glob("**/events.out.tfevents.*"))
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed at the very end
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    logs = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert {each.name for each in logs} == {f"run-{name}.wandb"}


def test_a_run_may_go_on_without_what_it_cannot_log_into(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    recipe = tiny_recipe(**{"train.wandb": "pictures", "schedule.epochs": 1})
    with pytest.raises(TrainingError, match=r"^Weights & Biases does not start: .*WANDB_MODE=offline.*--resume auto.$"):
        train(recipe, tmp_path / "run", quiet=True)
    assert train(recipe.replace(**{"train.wandb": ""}), tmp_path / "run", resume=True, quiet=True).epoch == 1
