"""Images per second of the input pipeline beside timm's ``create_loader``, on the same pictures and settings.

    python scripts/benchmark_data.py ../shared/data/imagenet-1k-sample

Both have as many workers, decode the same JPEG files, and hand over normalised float32 batches on the CPU. They take
turns, epoch by epoch; figures are medians over epochs, and what counts is the ratio. timm runs both as it normalises in
its workers (``use_prefetcher=False``) and in the main process (``True``); the faster one is the reference. The ratio by
CPU time, of all processes together, is the steadier one on a machine that does other things too.

Text: tokens per second from memory-mapped tokens, and the share of them that are real.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_dataset, create_loader

from zoo.data.augment import TrainTransform
from zoo.data.image import Normalise
from zoo.data.loader import EpochSampler, ImageSamples, Loader, TextSamples
from zoo.data.sources import FolderSource, open_source
from zoo.data.text import Documents, tiny_shakespeare
from zoo.data.tokens import IGNORED, Bytes, Rows, read_tokens, write_tokens
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Augment

BATCH = 64
SETTINGS = {
    "crop + flip": {},
    "crop + flip + RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a data set of JPEG pictures, such as ../shared/data/imagenet-1k-sample")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--copies", type=int, default=3, help="of each picture, so that an epoch is more than its ends")
    parser.add_argument("--side", type=int, default=224, help="pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mend_timm()
    with tempfile.TemporaryDirectory() as folder:
        count = unpack(options.data, Path(folder), options.copies)
        print(f"{count} pictures, {options.side} px, batch {BATCH}, {options.workers} workers, {options.epochs} epochs")
        for name, settings in SETTINGS.items():
            compare(name, loaders(Path(folder), options.side, options.workers, settings), options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        text(Path(folder))


def unpack(data: str, folder: Path, copies: int) -> int:
    """Write the pictures as files, which both pipelines read; returns how many."""
    source = open_source(data, split="validation")
    for i in range(copies * len(source)):
        place = folder / f"{i % 10}"
        place.mkdir(exist_ok=True)
        (place / f"{i}.jpg").write_bytes(source.encoded(i % len(source)))
    return copies * len(source)


def mend_timm() -> None:
    """timm 1.0.31 stops with an error where it posterises to no bits at all, which Pillow refuses since version 13."""

    def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
        return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))

    for name, function in auto_augment.NAME_TO_OP.items():
        if function is auto_augment.posterize:
            auto_augment.NAME_TO_OP[name] = posterize


def loaders(folder: Path, side: int, workers: int, settings: dict) -> dict[str, Iterable]:
    """By name, what an epoch of batches can be drawn from again and again; workers stay between the epochs."""
    preprocessing = Preprocessing(img_size=(side, side))
    source = FolderSource(folder)
    samples = ImageSamples(source, np.arange(len(source)), TrainTransform(Augment(**settings), preprocessing), seed=0)
    ours = Loader(samples, EpochSampler(len(samples), BATCH, shuffle=True), workers=workers)
    theirs = {
        prefetch: create_loader(
            create_dataset("", root=str(folder)),
            side,
            BATCH,
            is_training=True,
            color_jitter=None,  # type: ignore[arg-type]
            interpolation="bicubic",
            num_workers=workers,
            use_prefetcher=prefetch,
            device=torch.device("cpu"),
            **settings,
        )
        for prefetch in (False, True)
    }
    return {
        "zoo": Normalised(ours, Normalise(preprocessing, reuse=True)),  # as the engine does
        "timm, normalising in the workers": theirs[False],
        "timm, normalising in the main process": theirs[True],
    }


class Normalised:
    """Our loader with the stage that the engine adds."""

    def __init__(self, loader: Loader, normalise: Normalise) -> None:
        self.loader, self.normalise = loader, normalise

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loader:
            yield self.normalise(batch.inputs, batch.patches), batch.targets


def compare(setting: str, candidates: dict[str, Iterable], epochs: int) -> None:
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for epoch in range(epochs + 1):
        for name, batches in candidates.items():
            count, before, began = 0, cpu_seconds(), time.perf_counter()
            for inputs, _ in batches:
                assert inputs.dtype == torch.float32
                count += len(inputs)
            if epoch:  # the first one starts the workers
                wall[name].append((time.perf_counter() - began) / count)
                cpu[name].append((cpu_seconds() - before) / count)
    print(f"\n{setting}")
    for name in candidates:
        print(
            f"  {name:40s} {1 / statistics.median(wall[name]):6.0f} images/s, "
            f"{1000 * statistics.median(cpu[name]):.3f} ms of CPU time an image"
        )
    for kind, figures in (("wall", wall), ("CPU", cpu)):
        ours, *theirs = (statistics.median(figures[name]) for name in candidates)
        print(f"  ratio by {kind} time: {min(theirs) / ours:.2f}")


def cpu_seconds() -> float:
    """Of this process and its workers."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def text(folder: Path, length: int = 1024, batch: int = 32) -> None:
    plays = tiny_shakespeare().split("\n\n")  # many short documents: the hard case
    write_tokens(Documents("plays", lambda: (play for _ in range(10) for play in plays)), "bytes", folder, "train")
    rows = Rows(read_tokens(folder, "train"), length)
    loader = Loader(TextSamples(rows), EpochSampler(len(rows), batch, shuffle=True))
    rates = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        began, count, real = time.process_time(), 0, 0
        for each in loader:
            count += each.inputs.numel()
            real += int((each.targets != IGNORED).sum())
        rates.append(count / (time.process_time() - began))
    documents = sum(map(len, rows.tokens.starts))
    print(
        f"\ntext: {len(rows.tokens):,} tokens ({Bytes.vocab_size} kinds) in {documents:,} documents, rows of {length}"
    )
    print(f"  {statistics.median(rates) / 1e6:.1f} million tokens/s of CPU time in one process")
    print(f"  {100 * real / count:.1f} % of the tokens are real and have a target")


if __name__ == "__main__":
    main()
