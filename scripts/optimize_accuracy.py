"""What bf16 and int8 cost in accuracy: weights that come with zoo, on CIFAR-10's test pictures.

    python scripts/optimize_accuracy.py CIFAR10_FOLDER [MODEL.TAG ...] [--precision bf16 int8] [--count 2000]

``CIFAR10_FOLDER`` holds the parquet files ``train*`` and ``test*``. Every form that zoo.optimize would check is built
and looked at, fast or not: each engine in each precision. int8 is calibrated on 256 pictures of the training split.
``same class`` says how far a form is from eager; top-1 on N pictures is itself uncertain by 100 sqrt(p (1 - p) / N) %,
0.9 on 2,000 at 77 %.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor

from zoo.data.image import EvalTransform, Normalise
from zoo.deploy.engines import CALIBRATION, SOURCES, Job, get_engine
from zoo.deploy.program import capture, fused, save_program
from zoo.deploy.source import Shipped, load_for_shipping

BATCH = 50


def read(folder: Path, split: str, shipped: Shipped, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures as the model takes them, and their classes."""
    transform = EvalTransform(shipped.preprocessing)
    rows = [row for file in sorted(folder.rglob(f"{split}*.parquet")) for row in parquet.read_table(file).to_pylist()]
    assert rows, f"{folder} has no {split}*.parquet"
    rows = rows[:count]
    images = [transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    return Normalise(shipped.preprocessing)(torch.stack(images)), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=["efficientvit_m0.zoo_cifar10", "tinynet_e.zoo_cifar10"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--count", type=int, help="test pictures, from the start; all by default")
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| weights | engine | relative error | same class as fp32 eager | top-1 on test |")
    print("|---|---|---:|---:|---:|")
    for name in options.models:
        shipped = load_for_shipping(name)
        images, labels = read(options.folder, "test", shipped, options.count)
        calibration, _ = read(options.folder, "train", shipped, 256)
        batches = images[: len(images) // BATCH * BATCH].split(BATCH)
        classes = labels[: len(batches) * BATCH]
        with torch.inference_mode():
            logits = torch.cat([shipped.model(x) for x in batches])
        expected = logits.argmax(1)
        print(f"| `{name}` | eager fp32 | - | - | {100 * (expected == classes).float().mean():.2f} % |", flush=True)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            source = Path(folder) / SOURCES["onnx"]
            save_program(capture(fused(shipped.model), (batches[0],)), source, onnx=True)
            np.save(source.parent / CALIBRATION, calibration.numpy())
            for engine, precision in product(options.engines, options.precision):
                job = Job(engine=engine, precision=precision, threads=options.threads, batch=BATCH)
                if get_engine(engine).refuses(precision, "cpu"):
                    continue
                built = Path(folder) / f"{engine}-{precision}"
                built.mkdir()
                with contextlib.redirect_stdout(sys.stderr):  # NNCF tells of each operator
                    get_engine(engine).build(source, built, job)
                run = get_engine(engine).load(built, job)
                answers = torch.cat([run(x)[0] for x in batches])
                error = (answers - logits).square().mean().sqrt() / logits.square().mean().sqrt()
                same, right = (100 * (answers.argmax(1) == wanted).float().mean() for wanted in (expected, classes))
                print(
                    f"| `{name}` | {engine} {precision} | {error:.1e} | {same:.2f} % | {right:.2f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
