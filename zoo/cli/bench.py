"""``zoo bench``"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zoo.analysis.bench import Conditions
    from zoo.analysis.benchmark import Passport


def numbers(text: str, what: str) -> list[int]:
    """``"1,32"`` -> ``[1, 32]``."""
    from zoo.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{what} is {text!r}; expected whole numbers with commas between them, such as 1,32."
        ) from None


def bench(
    models: Annotated[list[str], typer.Argument(help="Names, or wildcards such as 'efficientvit*'.")],
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda, cuda:1, mps.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batches besides 1 and the saturating one: 8,32.")] = "1",
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU; all cores by default.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    backend: Annotated[str, typer.Option(help="eager, compile, onnxruntime, openvino or inductor.")] = "eager",
    fuse: Annotated[bool, typer.Option(help="Fuse the models, as for inference.")] = True,
    clock: Annotated[str, typer.Option(help="wall, or cpu: the process's time on all cores.")] = "wall",
    rounds: Annotated[int, typer.Option(help="Turns of each model.", min=1)] = 9,
    tokens: Annotated[int, typer.Option(help="Length of a language model's input.", min=1)] = 128,
    six_metrics: Annotated[bool, typer.Option(help="EfficientLLM's six metrics of language models instead.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the records as a CSV table.")] = None,
    save: Annotated[bool, typer.Option(help="Keep the records for `zoo pick` and `zoo pareto`.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Measure latency, throughput and peak memory of models, in turns, at batch 1 and the saturating batch."""
    import dataclasses
    import sys

    from zoo.analysis.bench import Conditions
    from zoo.analysis.bench import bench as measure
    from zoo.analysis.records import as_csv
    from zoo.atomic import write_atomically
    from zoo.cli._output import console, print_json

    conditions = Conditions(
        device=device,
        threads=threads,
        precision=precision,
        backend=backend,
        fuse=fuse,
        clock=clock,
        rounds=rounds,
        tokens=tokens,
    )

    if six_metrics:
        _six_metrics(models, numbers(batch, "--batch"), conditions, as_json=as_json)
        return

    def show(record: "Passport") -> None:
        if sys.stderr.isatty():
            print(f"{record.model}, batch {record.batch}: {record.latency_ms:.3g} ms", file=sys.stderr)

    records = measure(models, batches=numbers(batch, "--batch"), conditions=conditions, save=save, on_record=show)
    if csv is not None:
        with write_atomically(csv) as file:
            file.write(as_csv(records).encode())
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
        return
    screen = console()
    screen.print(_grid(records))
    first = records[0]
    screen.print(
        f"{first.cpu if first.gpu is None or first.device == 'cpu' else first.gpu}, {first.threads} threads, "
        f"{first.backend}, {first.precision}, {first.clock} time, {first.versions}, load average {first.load}",
        markup=False,
    )
    screen.print(
        "Medians of rounds in turns, with quartiles. * saturates: twice the batch gives less than 5 % more throughput.",
        markup=False,
    )
    if not all(record.settled for record in records):
        screen.print("~ did not settle during its warm-up: the machine has other work to do.", markup=False)
    if unproven := {record.model for record in records} - {record.model for record in records if record.saturating}:
        screen.print(
            f"No * for {', '.join(sorted(unproven))}: the next larger batch was too slow, too large or not tried.",
            markup=False,
        )
    if all(record.saturating for record in records if record.batch == 1):
        screen.print("No larger batch than 1 gives these models more throughput here.", markup=False)


def _six_metrics(models: list[str], batches: list[int], conditions: "Conditions", *, as_json: bool) -> None:
    import dataclasses

    from zoo.analysis.bench import resolve
    from zoo.analysis.language import six_metrics
    from zoo.cli._output import console, print_json, table

    names = [name for name, _ in resolve(models)]
    found = [six_metrics(name, batch=batch, conditions=conditions) for name in names for batch in batches]
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    for each in found:
        title = f"{each.model}, batch {each.batch}, {each.prompt_tokens} tokens read, {each.new_tokens} written"
        grid = table("", title, "")
        for row in each.rows():
            grid.add_row(*row)
        console().print(grid)


def _grid(records: "list[Passport]") -> object:
    from zoo.analysis.benchmark import compare
    from zoo.cli._output import table

    first = {record.batch: record for record in reversed(records)}
    models = {record.model for record in records}
    columns = [">batch", ">ms", ">quartiles", ">p90", ">p99", ">samples/s", ">peak MB"]
    grid = table("model", *columns, *([">time / the first's"] if len(models) > 1 else []))
    for record in records:
        marks = ("*" if record.saturating else "") + ("" if record.settled else "~")
        memory = "not measured" if record.peak_memory is None else f"{record.peak_memory / 1e6:.0f}"
        row = [
            record.model,
            f"{record.batch}{marks}",
            f"{record.latency_ms:.3g}",
            f"{record.latency_ms_q1:.3g} to {record.latency_ms_q3:.3g}",
            f"{record.latency_ms_p90:.3g}",
            f"{record.latency_ms_p99:.3g}",
            f"{record.samples_per_s:.4g}",
            memory,
        ]
        other = first[record.batch]
        if len(models) > 1:
            if other is record:
                row.append("")
            elif other.session != record.session:
                row.append("not measured in turns with it")
            else:
                row.append(str(compare(other, record)))
        grid.add_row(*row)
    return grid
