"""Puts the runs of tinyshakespeare/ that replicate the paper's comparison side by side, in the README and as curves.

    for name in mor_2m_r3 recursive_2m_r3 vanilla_2m; do
    OMP_NUM_THREADS=1 zoo train tinyshakespeare/$name --out runs/$name --resume auto; done
    python scripts/compare_recursions.py runs --hardware "one core of ..."

A recipe without a finished run has a row that says so. Nothing is trained here. Training FLOPs are six to each
multiply-accumulate of a token's forward pass, as the paper counts them. Losses are nats a byte on the held-out tenth;
speeds are medians in turns, of CPU time on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _sections import replace
from _timing import in_turns

from zoo.analysis.counts import count_modules
from zoo.atomic import write_atomically
from zoo.data.loader import TextSamples
from zoo.data.tokens import Rows
from zoo.inference import load_model
from zoo.serve import DepthBatcher
from zoo.train.device import make_accelerator
from zoo.train.finetune import read_metrics
from zoo.train.recipe import Recipe, load_recipe
from zoo.train.run_folder import RunFolder
from zoo.train.scoring import TextScoring, evaluate
from zoo.train.tasks import eval_loader, open_tokens

ROOT = Path(__file__).parent.parent
NAMES = ("vanilla_2m", "recursive_2m_r3", "mor_2m_r3")
SEQUENCES, PROMPT, WRITTEN = 32, 32, 8  # of the speed of writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of run folders, each named as its recipe")
    parser.add_argument("--root", default="", help="where the data set is, if not where the runs found it")
    parser.add_argument("--hardware", required=True, help="what this runs on, for the table's caption")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = {name: RunFolder(arguments.runs / name) for name in NAMES}
    models: dict[str, Any] = {name: load_model(run.path)[0] for name, run in runs.items() if run.result.is_file()}
    recipes = {name: load_recipe(runs[name].recipe) for name in models}
    speeds = measure_speeds(models, recipes, arguments.rounds)
    rows, curves = [], {}
    for name in NAMES:
        if name not in models:
            rows.append(f"| `{name}` | not run |" + " - |" * 6)
            continue
        recipe, model = recipes[name], models[name]
        macs = count_modules(model.model.arch, tokens=recipe.data.seq_len)[""].macs / recipe.data.seq_len
        history = read_metrics(runs[name])
        tokens = [row["step"] * recipe.train.batch_size * recipe.data.seq_len for row in history]
        curves[name] = ([6 * macs * seen for seen in tokens], [row["val_loss"] for row in history])
        params = sum(parameter.numel() for parameter in model.parameters())
        loss, depth, repeats = history[-1]["val_loss"], "", model.model.arch.num_recursions
        if model.model.arch.router != "none":
            loss, depth = heldout_loss(model, recipe, arguments.root)
        start = f"| `{name}` | {params / 1e6:.2f} | {tokens[-1] / 1e6:.2f} | {6e-12 * macs * tokens[-1]:.1f} |"
        steps, writes = speeds[f"{name} trains"], speeds[f"{name} writes"]
        rows.append(f"{start} {loss:.3f} | {depth or repeats} | {steps:,.0f} | {writes:,.0f} |")
        if depth:
            with model.routing("topk"):
                loss, depth = heldout_loss(model, recipe, arguments.root)
            rows.append(f"| the same by its top-k, not causal | | | | {loss:.3f} | {depth} | | |")
    head = [
        "| recipe | params (M) | bytes seen (M) | training TFLOPs | held-out loss | mean recursions "
        "| bytes/s trained on | bytes/s written |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    caption = (
        f"Held-out loss in nats a byte, recursions by threshold; seed {load_recipe('tinyshakespeare/mor_2m_r3').seed}. "
        f"Speeds are CPU time, in turns, on {arguments.hardware}, writing 32 sequences through `DepthBatcher`."
    )
    table = "\n".join([*head, *rows, "", caption])
    replace(ROOT / "README.md", "recursions", table)
    if curves:
        plot(curves, ROOT / "docs" / "recursions.png")
    print(table)


def heldout_loss(model: Any, recipe: Recipe, root: str) -> tuple[float, str]:
    """Nats a byte of the held-out text, and the recursions that its bytes took on average."""
    tokens = open_tokens(recipe.data, recipe.data.train_split, root=root).split(recipe.data.holdout)[1]
    accelerator = make_accelerator("fp32")
    loader = eval_loader(TextSamples(Rows(tokens, recipe.data.seq_len, keep_tail=True)), recipe, 8, accelerator)
    model.reset_mean_depth()
    loss = evaluate(model.eval(), loader, TextScoring(), accelerator)["loss"]
    return loss, f"{model.mean_depth:.2f}"


def measure_speeds(models: dict[str, Any], recipes: dict[str, Recipe], rounds: int) -> dict[str, float]:
    """Bytes a second of training and of writing, for each model."""
    timers: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        length, batch = recipes[name].data.seq_len, recipes[name].train.batch_size
        ids = torch.randint(0, 256, (batch, length))

        def training(model: Any = model, ids: torch.Tensor = ids) -> float:
            model.train()
            start = time.process_time()
            model(ids, labels=ids).loss.backward()
            seconds = time.process_time() - start
            model.zero_grad(set_to_none=True)
            model.eval()
            return ids.numel() / seconds

        def writing(model: Any = model, ids: torch.Tensor = ids) -> float:
            batcher = DepthBatcher(model, max_sequences=SEQUENCES)
            batcher.eos = None
            for i in range(SEQUENCES):
                batcher.submit(ids[i % len(ids), i : i + PROMPT], max_new_tokens=1 << 20)
            batcher.step()
            before, start = written(batcher), time.process_time()
            for _ in range(WRITTEN * batcher.trunk.config.num_recursions):
                batcher.step()
            return (written(batcher) - before) / (time.process_time() - start)

        timers |= {f"{name} trains": training, f"{name} writes": writing}
    return {name: statistics.median(samples) for name, samples in in_turns(rounds, timers).items()}


def written(batcher: DepthBatcher) -> int:
    """Tokens written so far."""
    return sum(len(place.result.tokens) for place in batcher.places if place is not None)


def plot(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Held-out loss over training FLOPs."""
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, (flops, losses) in curves.items():
        axes.plot([each / 1e12 for each in flops], losses, marker=".", label=name)
    axes.set(xlabel="training TFLOPs", ylabel="held-out loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(path) as file:
        canvas.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
