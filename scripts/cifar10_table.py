"""Evaluates runs of recipes of cifar10/ on the whole test set, and writes the README's table and its picture of curves.

    for name in recipes/cifar10/*-short.toml recipes/cifar10/*-finetune.toml; do run=runs/$(basename $name .toml)
    OMP_NUM_THREADS=1 /usr/bin/time -v -a -o $run.time zoo train $name data.root=PATH --out $run --resume auto; done
    python scripts/cifar10_table.py runs --root PATH --hardware "one core of ..."

A recipe without a finished run has a row that says so. Nothing is trained here.
"""

import argparse
import re
from pathlib import Path

from _sections import replace

from zoo.atomic import write_atomically
from zoo.train.evaluate import evaluate_run
from zoo.train.finetune import read_metrics
from zoo.train.recipe import list_recipes, load_recipe
from zoo.train.run_folder import RunFolder, read_json

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of run folders, each named as its recipe")
    parser.add_argument("--root", default="", help="where the data set is, if not where the runs found it")
    parser.add_argument("--hardware", required=True, help="what the runs were made on, for the table's caption")
    arguments = parser.parse_args()
    names = [name for name in list_recipes() if name.startswith("cifar10/") and name.endswith(("-short", "-finetune"))]
    rows = [
        "| recipe | px | pictures seen | test top-1 (%) | held out, averaged | held out, raw | core-minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    histories: dict[str, list[dict[str, float]]] = {}
    for name in names:
        run = RunFolder(arguments.runs / Path(name).name)
        recipe = load_recipe(name)
        start = f"| `{name}` |"
        if not run.result.is_file():
            rows.append(f"{start} - | - | not run | - | - | - |")
            continue
        histories[name] = read_metrics(run)
        figures = evaluate_run(run.path, split="test", root=arguments.root)
        side = read_json(run.config)["preprocessing"]["img_size"][0]
        seen = int(histories[name][-1]["step"]) * recipe.train.batch_size
        rows.append(
            f"{start} {side} | {seen:,} | {figures['top1']:.2f} | {histories[name][-1]['ema_top1']:.1f} | "
            f"{histories[name][-1]['val_top1']:.1f} | {_cpu_minutes(run.path.with_suffix('.time'))} |"
        )
    caption = f"Core-minutes are CPU time of training with its evaluations and data workers, on {arguments.hardware}."
    table = "\n".join([*rows, "", caption])
    replace(ROOT / "README.md", "cifar10", table)
    if histories:
        _plot(histories, ROOT / "docs" / "cifar10.png")
    print(table)


def _cpu_minutes(path: Path) -> str:
    """CPU time of all sittings, from what GNU time wrote; unknown without that."""
    if not path.is_file():
        return "not measured"
    times = re.findall(r"(?:User|System) time \(seconds\): ([\d.]+)", path.read_text(encoding="utf-8"))
    return f"{sum(map(float, times)) / 60:.1f}"


def _plot(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in histories.items():
        share = [row["epoch"] / len(rows) for row in rows]
        axes.plot(share, [row["ema_top1"] for row in rows], marker=".", label=name.removeprefix("cifar10/"))
    axes.set(xlabel="share of the budget", ylabel="top-1 on 1,000 held-out pictures (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with write_atomically(path) as file:
        canvas.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
