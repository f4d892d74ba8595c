"""``zoo calibrate``"""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zoo.analysis.calibrate import Sample


def calibrate(
    models: Annotated[list[str] | None, typer.Argument(help="Models to time; all under 2 GMACs by default.")] = None,
    device: Annotated[str, typer.Option(help="Where: cpu.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batches to run.")] = "1",
    threads: Annotated[int | None, typer.Option(help="Of torch; all cores by default.", min=1)] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu: the process's time on all cores.")] = "wall",
    rounds: Annotated[int, typer.Option(help="Of each whole model.", min=1)] = 5,
    save: Annotated[bool, typer.Option(help="Keep it for `zoo pick` and for latency targets.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every operator of some models, to predict the latency of any config on this machine, and say how well."""
    import sys

    from zoo.analysis.bench import Conditions, resolve
    from zoo.analysis.calibrate import calibrate as run
    from zoo.analysis.calibrate import calibration_path
    from zoo.cli._output import console, print_json
    from zoo.cli.bench import numbers

    def show(sample: "Sample") -> None:
        if sys.stderr.isatty():
            print(f"{sample.model}, batch {sample.batch}: {1e3 * sample.latency:.3g} ms", file=sys.stderr)

    names = [name for name, _ in resolve(models)] if models else None
    conditions = Conditions(device=device, threads=threads, clock=clock, rounds=rounds)
    found = run(names, batches=numbers(batch, "--batch"), conditions=conditions, save=save, on_sample=show)
    errors = found.errors()
    operators = sum(len(sample.rows) for sample in found.samples)
    if as_json:
        print_json(
            {
                "machine": found.machine,
                "device": found.device,
                "threads": found.threads,
                "clock": found.clock,
                "models": len({sample.model for sample in found.samples}),
                "operators": operators,
                "median_error": errors,
                "path": str(calibration_path(device, found.threads, clock)) if save else None,
            }
        )
        return
    out = console()
    out.print(f"{len(found.samples)} runs, {operators:,} operators, {found.threads} threads, {found.clock} time")
    for what, error in errors.items():
        left_out = "one model in six" if what == "models" else "a whole family at a time"
        out.print(f"median error on {what} left out of the fit ({left_out}): {100 * error:.1f} %", markup=False)
