"""``zoo export``"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A model, model.tag, a run folder, or hf-hub:owner/name.")],
    format: Annotated[
        str, typer.Option(help="onnx, openvino, torch-export, torchscript, executorch or coreml.")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder to write; MODEL-FORMAT by default.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels; the model's own by default.")] = None,
    free_size: Annotated[bool, typer.Option("--free-size", help="One file for every height and width.")] = False,
    pixels: Annotated[bool, typer.Option("--pixels", help="Scaling and normalising inside: pixels go in.")] = False,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Take a model without weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Write a model for another runtime, and check the file there."""
    from zoo.cli._output import console, print_json, table
    from zoo.deploy.export import export as write

    exported = write(
        model, format, out, img_size=img_size, free_size=free_size, pixels=pixels, random_weights=random_weights
    )
    if as_json:
        print_json({**exported.manifest, "path": str(exported.path)})
        return
    shown = console()
    manifest = exported.manifest
    if exported.verified:
        grid = table("input", ">max difference", ">allowed", ">top-1 same")
        for check in manifest["checks"]:
            shape = " x ".join(map(str, check["input"]))
            allowed = manifest["tolerance"] * check["scale"]
            grid.add_row(shape, f"{check['max_abs']:.1e}", f"{allowed:.1e}", f"{check['top1_same']:.0%}")
        shown.print(grid)
    else:
        shown.print("Written, and not run: its runtime does not exist on this system.")
    if manifest["random_weights"]:
        shown.print("The weights are random: its answers mean nothing.")
    pre = manifest["preprocessing"]
    shown.print(f"\n{exported.path}, with manifest.json beside it", soft_wrap=True, markup=False)
    shown.print(
        f"input: {pre['img_size'][0]} x {pre['img_size'][1]} px, crop {pre['crop_pct']:g} ({pre['crop_mode']}), "
        f"{pre['interpolation']}, {manifest['input']['values']}\n",
        soft_wrap=True,
        markup=False,
    )
    shown.print(exported.snippet, soft_wrap=True, markup=False)
