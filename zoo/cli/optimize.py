"""``zoo optimize``"""

from pathlib import Path
from typing import Annotated

import typer


def optimize(
    model: Annotated[str, typer.Argument(help="A model, model.tag, a run folder, or hf-hub:owner/name.")],
    target: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="auto, or fp32, bf16, fp16, int8, several with commas; fp32 is always tried.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder to save the fastest form in.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a call.")] = 1,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels; the model's own by default.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of real pictures, to check on and to calibrate int8 with.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Relative rms difference to the original's outputs; in fp32 1e-4 at most.")
    ] = 1e-2,
    engines: Annotated[str | None, typer.Option(help="Engines to try, with commas; all by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that the search may take.")] = 60.0,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Take a model without weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fastest form of a model here that still answers the same, and save it."""
    import torch

    import zoo
    from zoo.cli._output import console, print_json
    from zoo.deploy.folder import OPTIMISED
    from zoo.deploy.optimize import check_request
    from zoo.deploy.source import load_for_shipping, read_pictures

    precisions = precision if precision == "auto" else precision.split(",")
    names = engines.split(",") if engines else None
    check_request(target, precisions, names)  # now rather than after a download
    if out is not None:
        OPTIMISED.check_place(out)
    shipped = load_for_shipping(model, img_size=img_size, random_weights=random_weights)
    samples = None if pictures is None else read_pictures(pictures, shipped.preprocessing)
    height, width = shipped.preprocessing.img_size
    example = torch.randn(batch, shipped.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    fast = zoo.optimize(
        shipped.model,
        example if samples is None or len(samples) < batch else samples[:batch],
        target,
        precisions,
        tolerance,
        pictures=samples,
        engines=names,
        threads=threads,
        time_limit=time_limit,
    )
    if out is not None:
        fast.save(out)
    if as_json:
        print_json({"model": model, **fast.report.to_dict(), "out": str(out) if out is not None else None})
        return
    shown = console()
    shown.print(fast.report.table())
    shown.print(f"\n{model}: {fast.report.explanation}", soft_wrap=True, markup=False)
    if out is not None:
        shown.print(f"Saved; to use it: zoo.load_optimized({str(out)!r})(x), x {list(example.shape)}", soft_wrap=True)
