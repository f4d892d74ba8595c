"""TensorBoard, by its own reader, and Weights & Biases: the real package, offline, so that what would be sent lies in a
file of the run folder.
"""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zoo.errors import TrainingError
from zoo.train.engine import _Run, train
from zoo.train.finetune import read_metrics
from zoo.train.run_folder import RunFolder
from zoo.train.schedule import learning_rate

wandb = pytest.importorskip("wandb")


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: by name, (step, value)."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_rows_of_steps_and_of_epochs(tiny_recipe: Callable, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"train.tensorboard": True, "train.log_every": 1, "schedule.name": "linear"})
    train(recipe, tmp_path / "run", quiet=True)
    shown, (first, last) = scalars(tmp_path / "run"), read_metrics(RunFolder(tmp_path / "run"))
    assert [step for step, _ in shown["train_loss"]] == [6, 12]
    for name in ("step/loss", "step/learning_rate", "step/gradient_norm"):
        assert [step for step, _ in shown[name]] == list(range(1, 13))
    losses = [value for _, value in shown["step/loss"]]
    assert sum(losses[:6]) / 6 == pytest.approx(first["train_loss"], rel=1e-6)
    assert sum(losses[6:]) / 6 == pytest.approx(last["train_loss"], rel=1e-6)
    rates = [value for _, value in shown["step/learning_rate"]]
    assert rates == pytest.approx([learning_rate(recipe.schedule, recipe.optim.lr, i / 6) for i in range(12)])
    assert shown["learning_rate"] == [(6, rates[5]), (12, rates[11])]


@pytest.mark.parametrize(("log_every", "steps"), [(5, [5, 10]), (0, [])])
def test_every_so_many_steps(tiny_recipe: Callable, tmp_path: Path, log_every: int, steps: list[int]) -> None:
    train(tiny_recipe(**{"train.tensorboard": True, "train.log_every": log_every}), tmp_path / "run", quiet=True)
    shown = scalars(tmp_path / "run")
    assert [step for step, _ in shown.get("step/loss", [])] == steps
    assert [step for step, _ in shown["val_loss"]] == [6, 12]


def test_the_gradients_norm_is_that_before_clipping_and_changes_nothing(tiny_recipe: Callable, tmp_path: Path) -> None:
    """Each way of clipping goes its own way to the norm; a limit that nothing reaches leaves the training as it is."""
    base = {"train.tensorboard": True, "train.log_every": 3}
    ways = {"none": {}, "norm": {"optim.clip": 1e6}, "value": {"optim.clip": 1e6, "optim.clip_mode": "value"}}
    ways["accumulated"] = {"train.micro_batch": 4}
    norms = {}
    for name, changes in ways.items():
        train(tiny_recipe(**base, **changes), tmp_path / name, quiet=True)
        norms[name] = dict(scalars(tmp_path / name)["step/gradient_norm"])
        assert min(norms[name].values()) > 0
    assert norms["none"] == norms["value"] == pytest.approx(norms["norm"], rel=1e-5)
    assert norms["accumulated"].keys() == norms["none"].keys()
    train(tiny_recipe(**base, **{"optim.clip": 0.01}), tmp_path / "clipped", quiet=True)
    assert dict(scalars(tmp_path / "clipped")["step/gradient_norm"])[3] > 0.1
    train(tiny_recipe(), tmp_path / "unseen", quiet=True)
    assert (tmp_path / "unseen" / "metrics.csv").read_text() == (tmp_path / "none" / "metrics.csv").read_text()


def test_a_step_that_is_done_twice_is_shown_once(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after nine steps, of which a checkpoint knows eight."""
    recipe = tiny_recipe(**{"train.tensorboard": True, "train.log_every": 1, "train.save_steps": 4})
    train(recipe, tmp_path / "whole", quiet=True)
    step = _Run._optimiser_step

    def killed(self: _Run, batches: Any) -> Any:
        if self.step == 9:
            raise KeyboardInterrupt
        return step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "_optimiser_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", quiet=True)
    assert scalars(tmp_path / "run")["step/loss"][-1][0] == 9
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")


def test_a_full_disk_is_one_line_whoever_finds_it(
    tiny_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tiny_recipe(**{"train.tensorboard": True})
    with monkeypatch.context() as patched:
        patched.setattr(TensorBoardTracker, "finish", full)
        train(recipe, tmp_path / "at the end", quiet=True)
    assert caplog.messages == ["the last rows for TensorBoard are lost: No space left on device"]
    monkeypatch.setattr(TensorBoardTracker, "log", full)
    monkeypatch.setattr(TensorBoardTracker, "finish", full)  # which is not to hide the other
    with pytest.raises(TrainingError, match=r"^Cannot write rows for TensorBoard: No space left on device\. The last"):
        train(recipe, tmp_path / "midway", quiet=True)


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
    recipe = tiny_recipe(
        **{"train.wandb": "pictures", "train.tensorboard": True, "optim.lr": 0.00123, "train.log_every": 4}
    )
    train(recipe, tmp_path / "run", quiet=True)
    name = json.loads((tmp_path / "run" / "manifest.json").read_text())["id"]
    (log,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    logged = log.read_bytes()
    for expected in (
        b"pictures",
        b"0.00123",
        b"train_loss",
        b"val_top1",
        b"step/gradient_norm",
    ):  # project, config and figures
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
