"""``zoo.optimize`` against what its users would do otherwise, on this machine, side by side.

    python scripts/benchmark_optimize.py [MODEL ...] [--batch 1] [--threads 2] [--pictures FILE --precision bf16,int8]
    python scripts/benchmark_optimize.py [MODEL ...] --target cuda [--precision fp16]

The rivals, each on the same random weights: timm's eager model, its ``torch.compile``, a plain ONNX export of it in
onnxruntime, and the same file in OpenVINO; on a GPU eager, ``torch.compile`` and that with its CUDA graphs
("reduce-overhead"), also in fp16 and channels-last where zoo.optimize may take fp16. ``--against`` names some of them.
EfficientMod is none of timm's: there it is the authors' model, from ``--efficientmod models/EfficientMod.py`` of
github.com/ma-xu/EfficientMod, or else zoo's own before ``fuse()``. zoo.optimize searches once, in fp32 and what
``--precision`` allows. All take turns in one process; figures are medians of the rounds, and ratios are medians of the
rounds' ratios with their quartiles, above 1 where zoo.optimize is faster.

``--pictures`` is the parquet file of the ImageNet sample: zoo.optimize checks and calibrates on 128 of them or a batch,
as many as its time allows, and the share of all of them is printed of which the likeliest class is that of the float
model. Of random weights, that says how far the arithmetic is from fp32, and nothing about accuracy:
``scripts/optimize_accuracy.py`` has a figure for that.
"""

import argparse
import copy
import io
import os
import sys
import warnings
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from _authors import authors_efficientmod
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.analysis.benchmark import compare, machine, measure
from zoo.data.image import EvalTransform, Normalise
from zoo.preprocessing import Preprocessing

RIVALS = ("eager", "compile", "onnxruntime", "openvino")
GPU_RIVALS = ("eager", "compile", "reduce-overhead")
STATISTICS = 64  # pictures that batch norms see: of 8, other pictures differ so much that activations explode
MODELS = ("efficientvit_m5", "efficientformer_l1", "lowformer_b1", "efficientmod_s", "tinynet_a")


@torch.no_grad()
def fill(model: nn.Module, x: Tensor) -> nn.Module:
    """Random weights under which every layer counts: fresh ones have residual branches of zero.

    Scales are around a fifth: from a half on, a deep residual network such as EfficientViT-M5 makes roundings a hundred
    times as large. Batch norms take their statistics from ``x``, or activations would vanish or explode with the depth.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and tensor.ndim == 1:
            tensor.copy_(0.2 + 0.05 * torch.randn(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim > 1:
            tensor.copy_(tensor[0].numel() ** -0.5 * torch.randn(tensor.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all calls: over this one
    model.train()(x)
    return model.eval()


def read(file: Path, size: tuple[int, int], count: int) -> Tensor:
    """So many of the pictures of a parquet file, preprocessed."""
    import pyarrow.parquet as parquet

    preprocessing = Preprocessing(img_size=size)
    transform = EvalTransform(preprocessing)
    rows = parquet.read_table(file, columns=["image"]).slice(0, count).to_pylist()
    images = [transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return Normalise(preprocessing)(torch.stack(images))


def plain_model(name: str, model: nn.Module, efficientmod: Path | None) -> tuple[str, nn.Module]:
    """Whose model a user would start from, and that model."""
    if timm.is_model(name):
        plain = timm.create_model(name)
        plain.load_state_dict(model.state_dict(), strict=False)
        return "timm's", plain.eval()
    if name.startswith("efficientmod") and efficientmod is not None:
        return "the authors'", authors_efficientmod(efficientmod, name, model.state_dict())
    return "zoo's, not fused,", model


def rivals(kind: str, plain: nn.Module, x: Tensor, threads: int, names: Container[str]) -> dict[str, Callable[[], Any]]:
    """What a user would run without zoo.optimize; ``names`` are of RIVALS."""
    found: dict[str, Callable[[], Any]] = {}
    if "eager" in names:
        found[f"{kind} eager"] = lambda: plain(x)
    if "compile" in names:
        quick = torch.compile(plain)
        found["its torch.compile"] = lambda: quick(x)
    if "onnxruntime" not in names and "openvino" not in names:
        return found
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(plain, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
    if "onnxruntime" in names:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        found["its ONNX in onnxruntime"] = lambda: session.run(None, feed)
    if "openvino" in names:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(core.read_model(onnx), "CPU", settings).create_infer_request()
        found["its ONNX in OpenVINO"] = lambda: request.infer([x.numpy()], share_inputs=True)
    return found


def rivals_on_a_gpu(
    kind: str, plain: nn.Module, x: Tensor, names: Container[str], half: bool
) -> dict[str, Callable[[], Any]]:
    """The same on a GPU; ``names`` are of GPU_RIVALS. ``half``: also in fp16, in which cuDNN prefers channels-last."""
    forms = {"": (plain.to(x.device), x)}
    if half:
        low = copy.deepcopy(plain).half().to(memory_format=torch.channels_last)
        forms[" in fp16"] = (low, x.half().contiguous(memory_format=torch.channels_last))
    found: dict[str, Callable[[], Any]] = {}
    for suffix, (model, given) in forms.items():
        model(given)  # timm keeps tables of attention biases, which a CUDA graph would write over
        if "eager" in names:
            found[f"{kind} eager{suffix}"] = partial(model, given)
        if "compile" in names:
            found[f"its torch.compile{suffix}"] = partial(torch.compile(model), given)
        if "reduce-overhead" in names:
            found[f"the same with CUDA graphs{suffix}"] = partial(torch.compile(model, mode="reduce-overhead"), given)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--target", default="cpu", help="of zoo.optimize: cpu, or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=60.0, help="of the search, in seconds")
    parser.add_argument("--precision", default="fp32", help="what zoo.optimize may take besides fp32, with commas")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of those")
    parser.add_argument("--engines", help="of zoo.optimize, with commas; all by default")
    parser.add_argument("--against", nargs="+", choices=(*RIVALS, *GPU_RIVALS[2:]), help="rivals; all by default")
    parser.add_argument("--pictures", type=Path, help="parquet file with pictures, to calibrate with and to compare on")
    parser.add_argument("--count", type=int, default=1000, help="pictures to compare on")
    parser.add_argument("--efficientmod", type=Path, help="the authors' models/EfficientMod.py")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = RIVALS if options.target == "cpu" else GPU_RIVALS
    if unknown := sorted(set(options.against or ()) - set(known)):
        parser.error(f"--against is {', '.join(unknown)}; expected {', '.join(known)} on {options.target}.")

    here, on_gpu = machine(), options.target != "cpu"
    processor = here["gpu"] if on_gpu else f"{here['cpu']}, {here['cpu_capability']}, {options.threads} threads"
    print(f"{processor}, torch {torch.__version__}", end=", ")
    print(f"timm {timm.__version__}, load average {os.getloadavg()[0]:.2f} on {here['cores']} cores\n")
    print("| model | batch | zoo.optimize | ms | against | its ms | faster by | search (s) | top-1 same |")
    print("|---|---:|---|---:|---|---:|---:|---:|---:|")
    for name in options.models:
        torch.manual_seed(0)
        size = zoo.get_config(name).input_hw
        pictures = read(options.pictures, size, options.count) if options.pictures else None
        examples = torch.randn(STATISTICS, 3, *size) if pictures is None else pictures
        seen = examples[:: max(1, len(examples) // STATISTICS)][:STATISTICS]
        model = fill(zoo.create_model(name), seen)
        kind, plain = plain_model(name, model, options.efficientmod)
        for batch in options.batch:
            # Inputs are like those that the batch norms saw, or activations would explode and every rounding with them.
            noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
            x = noise if pictures is None else pictures[:batch].clone()
            fast = zoo.optimize(
                model,
                x,
                options.target,
                precision=options.precision.split(","),
                tolerance=options.tolerance,
                pictures=None if pictures is None else pictures[: max(128, batch)],
                threads=options.threads,
                time_limit=options.time_limit,
                engines=options.engines.split(",") if options.engines else None,
            )
            torch.compiler.reset()  # or it compiles the second batch's program for any batch
            with torch.inference_mode():  # made after the search, which its users run in a process without them
                if on_gpu:
                    x = x.to(options.target)
                    calls = rivals_on_a_gpu(kind, plain, x, options.against or known, "fp16" in options.precision)
                else:
                    calls = rivals(kind, plain, x, options.threads, options.against or known)
                timings = measure(
                    {"ours": partial(fast, x), **calls},
                    device=options.target,
                    threads=options.threads,
                    rounds=options.rounds,
                )
            print(f"\n{fast.report}\n", file=sys.stderr)
            chosen, seconds = fast.report.chosen, fast.report.facts["search_s"]
            exact = pictures is None or chosen.precision == "fp32"
            same = "-" if exact else f"{100 * agreement(model, fast, pictures, batch):.1f} %"
            for rival in calls:
                print(
                    f"| `{name}` | {batch} | {chosen.engine} {chosen.precision} | {1e3 * timings['ours'].median:.2f} "
                    f"| {rival} | {1e3 * timings[rival].median:.2f} | {compare(timings['ours'], timings[rival])} "
                    f"| {seconds:.0f} | {same} |",
                    flush=True,
                )
    print(f"\nLoad average after: {os.getloadavg()[0]:.2f}")


@torch.inference_mode()
def agreement(model: nn.Module, fast: Any, pictures: Tensor, batch: int) -> float:
    """The share of pictures whose likeliest class is the same."""
    whole = pictures[: len(pictures) // batch * batch].to(fast.job.target)
    model.to(fast.job.target)
    expected = torch.cat([model(x).argmax(1) for x in whole.split(50)])
    same = expected == torch.cat([fast(x).argmax(1) for x in whole.split(batch)])
    return float(same.float().mean())


if __name__ == "__main__":
    main()
