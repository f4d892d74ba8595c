"""``zoo predict``"""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[str, typer.Option(help="A model with weights, model.tag, a run folder, or hf-hub:owner/name.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify pictures: the likeliest classes with their probabilities."""
    from rich.markup import escape

    from zoo.cli._output import console, print_json, table
    from zoo.inference import load_classifier

    classifier = load_classifier(model, device=device)
    answers = classifier.predict(pictures, top=top)
    if as_json:
        rows = [
            {"picture": str(picture), "classes": [{"label": label, "probability": value} for label, value in answer]}
            for picture, answer in zip(pictures, answers, strict=True)
        ]
        print_json(rows)
        return
    out = console()
    for picture, answer in zip(pictures, answers, strict=True):
        out.print(str(picture), style="bold", markup=False, soft_wrap=True)
        grid = table(">%", "class")
        for label, value in answer:
            found = classifier.multi_label and value >= 0.5
            grid.add_row(f"{100 * value:.2f}", escape(label) + (" (yes)" if found else ""))
        out.print(grid)
