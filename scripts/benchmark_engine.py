"""The engine's cost beside the plainest loop: CPU time of a training step, of the same model on the same batches.

    python scripts/benchmark_engine.py [MODEL ...]
    python scripts/benchmark_engine.py [MODEL ...] --timm-script train.py --pictures FILE

Candidates take turns, block by block of steps: zoo's engine on zoo's model, the hand-written loop on zoo's model and on
timm's, and timm's model in a loop of timm's parts, which stands in for timm's training script (its wheel has none): in
channels-last too, normalised by its ``PrefetchLoader``, with what ``create_optimizer_v2`` and ``create_scheduler_v2``
give. The first two differ by the engine alone. Batches are made beforehand; the hand-written loop normalises them as
the engine does. Figures are medians over blocks, and what counts is the ratio.

With ``--timm-script``, the ``train.py`` of github.com/huggingface/pytorch-image-models, whole runs take turns: that
script and ``zoo train`` with the same settings, from files to weights, on the pictures of a parquet file (the ImageNet
sample's) as class folders. An epoch is half of what three take longer than one: starting is left out.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import timm
import torch
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import nn

import zoo
from zoo.data.image import Normalise
from zoo.data.loader import Batch
from zoo.preprocessing import Preprocessing
from zoo.train.engine import _Run
from zoo.train.recipe import resolve
from zoo.train.run_folder import RunFolder

MODELS = ("efficientvit_m0", "tinynet_e")  # timm has them under the same names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=0, help="pixels; by default the model's own")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="in a block")
    parser.add_argument("--timm-script", type=Path, help="timm's train.py: compare whole runs with its")
    parser.add_argument("--pictures", type=Path, help="parquet file of those runs' pictures")
    parser.add_argument("--rounds", type=int, default=3, help="of those runs")
    options = parser.parse_args()
    if options.timm_script:
        if not options.pictures:
            parser.error("--timm-script needs --pictures")
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(options.pictures, Path(folder, "pictures"))
            for name in options.models:
                compare_runs(name, options, Path(folder))
        return
    torch.set_num_threads(1)
    for name in options.models:
        compare(name, options)


def compare(name: str, options: argparse.Namespace) -> None:
    side = options.side or zoo.get_config(name).input_hw[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.batch, side, side, 3), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels.permute(0, 3, 1, 2), torch.arange(options.batch) % 10, torch.arange(options.batch))
    with tempfile.TemporaryDirectory() as folder:
        candidates = {
            "engine, zoo's model": engine(name, side, batch, Path(folder)),
            "plain loop, zoo's model": plain(zoo.create_model(name, num_classes=10, img_size=side), batch, side),
            "plain loop, timm's model": plain(timm_model(name, side), batch, side),
            "timm's parts and model": timms(timm_model(name, side), batch),
        }
        seconds: dict[str, list[float]] = {label: [] for label in candidates}
        for block in range(options.blocks + 1):
            for label, step in candidates.items():
                began = time.process_time()
                for _ in range(options.steps):
                    step()
                if block:  # the first one warms up
                    seconds[label].append((time.process_time() - began) / options.steps)
    print(f"{name}, batch {options.batch}, {side} px, one thread, fp32, AdamW")
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    for label, median in medians.items():
        print(f"  {label:26s} {1000 * median:8.1f} ms of CPU time a step")
    ours, *others = seconds
    for label in others:  # block by block, as the machine's speed drifts
        ratio = statistics.median(a / b for a, b in zip(seconds[ours], seconds[label], strict=True))
        print(f"  {ours} over {label}: {100 * (ratio - 1):+.1f} %")


def engine(name: str, side: int, batch: Batch, folder: Path) -> Callable[[], None]:
    """One call is one step of the engine, with all that it does between two steps."""
    recipe = resolve(
        {
            "model": {"name": name, "overrides": {"img_size": side}},
            "data": {"name": "digits", "workers": 0},
            "train": {"batch_size": len(batch.inputs), "tensorboard": False},
        },
        "benchmark",
    )
    run = _Run(recipe, RunFolder(folder), quiet=True)
    run.model.train()
    run.train_loader.set_epoch(0)
    run.progress.start_epoch()

    def batches() -> Iterator[Batch]:
        while True:
            yield batch

    def step() -> None:
        run.epoch_step = 0  # the epoch of the digits is short
        run._step(batches())

    return step


def timm_model(name: str, side: int) -> nn.Module:
    options = {"img_size": side} if name.startswith("efficientvit") else {}
    return timm.create_model(name, num_classes=10, **options)


def plain(model: nn.Module, batch: Batch, side: int) -> Callable[[], None]:
    """What one would write by hand."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    normalise = Normalise(Preprocessing(img_size=(side, side)), reuse=True)

    def step() -> None:
        loss = F.cross_entropy(model(normalise(batch.inputs)), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def timms(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """A step as timm's training script makes it."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=10, step_on_epochs=False, updates_per_epoch=1000)
    same = itertools.repeat((batch.inputs, batch.targets))
    batches = iter(PrefetchLoader(same, device=torch.device("cpu")))  # type: ignore[arg-type]
    criterion, losses, updates = nn.CrossEntropyLoss(), AverageMeter(), itertools.count(1)

    def step() -> None:
        inputs, targets = next(batches)
        loss = criterion(model(inputs.contiguous(memory_format=torch.channels_last)), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), len(inputs))
        scheduler.step_update(num_updates=next(updates), metric=losses.avg)

    return step


def write_pictures(file: Path, folder: Path) -> None:
    """The pictures of a parquet file in ten class folders; every eleventh is for validation."""
    for i, row in enumerate(parquet.read_table(file, columns=["image"]).to_pylist()):
        place = folder / ("val" if i % 11 == 10 else "train") / str(i % 10)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(row["image"]["bytes"])


def compare_runs(name: str, options: argparse.Namespace, folder: Path) -> None:
    commands = {"zoo train": zoo_train, "timm's train.py": timm_train}
    wall: dict[str, list[float]] = {label: [] for label in commands}
    cpu: dict[str, list[float]] = {label: [] for label in commands}
    for _ in range(options.rounds):
        for label, command in commands.items():
            (short, short_cpu), (long, long_cpu) = (cost_of(command(name, options, folder, n)) for n in (1, 3))
            wall[label].append((long - short) / 2)
            cpu[label].append((long_cpu - short_cpu) / 2)
    print(f"{name}, batch {options.batch}, one worker, fp32, AdamW, an epoch with its evaluation")
    for label in commands:
        print(
            f"  {label:26s} {statistics.median(wall[label]):6.1f} s, {statistics.median(cpu[label]):6.1f} s of CPU time"
        )
    for kind, seconds in (("time", wall), ("CPU time", cpu)):
        ours, theirs = seconds.values()
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(f"  {kind}: timm's over zoo's {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def zoo_train(name: str, options: argparse.Namespace, folder: Path, epochs: int) -> list[str]:
    recipe = folder / f"{name}-{epochs}.toml"
    overrides = f"\noverrides = {{ img_size = {options.side} }}" if options.side else ""
    recipe.write_text(f"""
[model]
name = "{name}"{overrides}
[data]
name = "{folder / "pictures"}"
workers = 1
interpolation = "bilinear"
[augment]
smoothing = 0.1
[optim]
name = "adamw"
lr = 1e-3
weight_decay = 0.05
[schedule]
epochs = {epochs}
warmup_epochs = 0
[train]
batch_size = {options.batch}
ema = 0
""")
    out = Path(tempfile.mkdtemp(dir=folder))
    return [sys.executable, "-m", "zoo", "train", str(recipe), "--out", str(out / "run")]


def timm_train(name: str, options: argparse.Namespace, folder: Path, epochs: int) -> list[str]:
    side = options.side or zoo.get_config(name).input_hw[0]
    script = [sys.executable, str(options.timm_script), "--data-dir", str(folder / "pictures")]
    data = ["--model", name, "--num-classes", "10", "--img-size", str(side), "-b", str(options.batch), "--workers", "1"]
    augment = ["--color-jitter", "0", "--smoothing", "0.1", "--train-interpolation", "bilinear"]
    optim = ["--opt", "adamw", "--lr", "1e-3", "--weight-decay", "0.05", "--sched", "cosine", "--warmup-epochs", "0"]
    run = ["--epochs", str(epochs), "--device", "cpu", "--channels-last", "--output", tempfile.mkdtemp(dir=folder)]
    return [*script, *data, *augment, *optim, *run]


def cost_of(command: list[str]) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, of a process and those that it started."""

    def cpu_time() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began, before = time.perf_counter(), cpu_time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - began, cpu_time() - before


if __name__ == "__main__":
    main()
