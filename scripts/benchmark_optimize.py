"""``zoo.optimize`` against what its users would do otherwise, on this machine, side by side.

    python scripts/benchmark_optimize.py [MODEL ...] [--batch 1 32] [--threads 2] [--precision fp32] [--pictures FILE]

The rivals, each on the same random weights: timm's eager model (zoo's own before ``fuse()`` where timm has none), its
``torch.compile``, a plain ONNX export of it in onnxruntime, and the same file in OpenVINO. All take turns in one
process; figures are medians of the rounds with quartiles, and ratios are medians of the rounds' ratios, above 1 where
zoo.optimize is faster. ``--precision int8`` needs ``--pictures``, the parquet file of the ImageNet sample; the
agreement that it prints is with the float model on those pictures, and of random weights: it says how far the
arithmetic is from fp32, and nothing about accuracy.
"""

import argparse
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.analysis.benchmark import compare, machine, measure
from zoo.data.image import EvalTransform, Normalise
from zoo.preprocessing import Preprocessing

MODELS = ("efficientvit_m5", "efficientformer_l1", "lowformer_b1", "efficientmod_s", "tinynet_a")


def fill(model: nn.Module) -> nn.Module:
    """Weights under which every layer counts: fresh ones have residual branches of zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(0.5 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point() and tensor.ndim > 1:
                std = tensor[0].numel() ** -0.5
                tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def read(file: Path, size: tuple[int, int], count: int) -> Tensor:
    """So many of the pictures of a parquet file, preprocessed."""
    import pyarrow.parquet as parquet

    preprocessing = Preprocessing(img_size=size)
    transform = EvalTransform(preprocessing)
    rows = parquet.read_table(file, columns=["image"]).slice(0, count).to_pylist()
    images = [transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return Normalise(preprocessing)(torch.stack(images))


def rivals(name: str, model: nn.Module, x: Tensor, threads: int, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What a user would run without zoo.optimize."""
    import onnxruntime
    import openvino

    plain: nn.Module = model
    if timm.is_model(name):
        plain = timm.create_model(name).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
    kind = "timm" if timm.is_model(name) else "zoo, not fused"
    found: dict[str, Callable[[], Any]] = {f"{kind} eager": lambda: plain(x)}
    if compiled:
        quick = torch.compile(plain)
        found["its torch.compile"] = lambda: quick(x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(plain, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    found["its ONNX in onnxruntime"] = lambda: session.run(None, feed)
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(onnx), "CPU", settings).create_infer_request()
    found["its ONNX in OpenVINO"] = lambda: request.infer([x.numpy()], share_inputs=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--engines", help="of zoo.optimize, with commas")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the rival out")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--pictures", type=Path, help="parquet file with pictures, to calibrate with and to compare on")
    parser.add_argument("--count", type=int, default=1000, help="pictures to compare on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    here = machine()
    print(f"{here['cpu']}, {here['cpu_capability']}, {options.threads} threads, torch {torch.__version__}", end=", ")
    print(f"timm {timm.__version__}, load average {os.getloadavg()[0]:.2f} on {here['cores']} cores\n")
    print("| model | batch | zoo.optimize | ms | against | its ms | faster by | search (s) | top-1 same |")
    print("|---|---:|---|---:|---|---:|---:|---:|---:|")
    for name in options.models:
        torch.manual_seed(0)
        model = fill(zoo.create_model(name))
        size = zoo.get_config(name).input_hw
        pictures = read(options.pictures, size, options.count) if options.pictures else None
        for batch in options.batch:
            x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                calls = rivals(name, model, x, options.threads, not options.no_compile)
            fast = zoo.optimize(
                model,
                x,
                precision=options.precision.split(","),
                tolerance=options.tolerance,
                pictures=None if pictures is None else pictures[:128],
                engines=options.engines.split(",") if options.engines else None,
                threads=options.threads,
                time_limit=options.time_limit,
            )
            with torch.inference_mode():
                timings = measure(
                    {"zoo.optimize": lambda fast=fast, x=x: fast(x), **calls},
                    threads=options.threads,
                    rounds=options.rounds,
                )
            ours, chosen = timings["zoo.optimize"], fast.report.chosen
            same = "-" if pictures is None else f"{100 * agreement(model, fast, pictures, batch):.1f} %"
            for kind in calls:
                theirs = timings[kind]
                print(
                    f"| `{name}` | {batch} | {chosen.engine} {chosen.precision} | {1e3 * ours.median:.1f} | {kind} "
                    f"| {1e3 * theirs.median:.1f} | {compare(ours, theirs)} | {fast.report.facts['search_s']:.0f} "
                    f"| {same} |",
                    flush=True,
                )
    print(f"\nLoad average after: {os.getloadavg()[0]:.2f}")


@torch.inference_mode()
def agreement(model: nn.Module, fast: Any, pictures: Tensor, batch: int) -> float:
    """The share of pictures whose likeliest class is the same."""
    same = [model(x).argmax(1) == fast(x).argmax(1) for x in pictures.split(batch) if len(x) == batch]
    return float(torch.cat(same).float().mean())


if __name__ == "__main__":
    main()
