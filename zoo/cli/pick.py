"""``zoo pick``"""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zoo.analysis.pick import Option


def pick(
    device: Annotated[str, typer.Option(help="Where the model is to run.")] = "cpu",
    latency_ms: Annotated[float | None, typer.Option(help="At most, batch 1.")] = None,
    images_per_s: Annotated[float | None, typer.Option(help="At least, at the best batch.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="At most, weights in memory.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="At most, peak of a call at batch 1.")] = None,
    params_m: Annotated[float | None, typer.Option(help="Millions of parameters, at most.")] = None,
    macs_m: Annotated[float | None, typer.Option(help="Millions of multiply-accumulates, at most.")] = None,
    top1: Annotated[float | None, typer.Option(help="Published accuracy on ImageNet-1k in percent, at least.")] = None,
    licence: Annotated[str, typer.Option(help="Of the weights: mit,apache-2.0")] = "",
    runtime: Annotated[str, typer.Option(help="Only this one: 'eager, fused', openvino, ...")] = "",
    precision: Annotated[str, typer.Option(help="Only this one: fp32, bf16, ...")] = "",
    threads: Annotated[int | None, typer.Option(help="Only what was measured with so many.", min=1)] = None,
    why_not: Annotated[list[str] | None, typer.Option(help="Say why a model is not the answer.")] = None,
    others: Annotated[bool, typer.Option(help="Take records of other machines too, and say whose they are.")] = False,
    shortlist: Annotated[bool, typer.Option(help="Measure models whose predicted latency fits.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Choose a model: the most accurate within a budget; with only --top1, the fastest that reaches it."""
    import dataclasses

    from zoo.analysis.pick import Budget, check_model
    from zoo.analysis.pick import pick as choose
    from zoo.cli._output import console, print_json
    from zoo.errors import ZooError

    for name in why_not or []:
        check_model(name)
    budget = Budget(
        latency_ms=latency_ms,
        images_per_s=images_per_s,
        size_mb=size_mb,
        memory_mb=memory_mb,
        params_m=params_m,
        macs_m=macs_m,
        top1=top1,
        licence=licence,
        runtime=runtime,
        precision=precision,
        threads=threads,
        device=device,
    )
    choice = choose(budget, others=others, shortlist=shortlist)
    reasons = {name: choice.why_not(name) for name in why_not or []}
    if as_json:
        values = dataclasses.asdict(choice)
        del values["options"]
        print_json(values | {"why_not": reasons})
        return
    out = console()
    if choice.measured:
        out.print(f"measured for this: {', '.join(choice.measured)}", markup=False)
    if choice.best is None:
        for reason in reasons.values():
            out.print(reason, markup=False)
        nearest = min(choice.options, key=lambda option: (len(budget.objections(option)), option.latency_ms))
        raise ZooError(f"No model fits. The nearest is {nearest.model}: {'; '.join(budget.objections(nearest))}.")
    _print(choice.best, choice.runners_up, choice.pareto, budget.latency_ms)
    for reason in reasons.values():
        out.print(reason, markup=False)


def _print(
    best: "Option", runners_up: "tuple[Option, ...]", pareto: "tuple[Option, ...]", limit_ms: float | None
) -> None:
    from zoo.analysis.pick import compared
    from zoo.cli._output import console, table

    out = console()
    out.print(f"[bold]{best.model}[/bold]  {best.weights}, licence {best.licence}")
    out.print(f"published top-1 {best.top1:g} % ({best.source})", markup=False)
    out.print(
        f"{best.latency_ms:.3g} ms ({best.latency_q[0]:.3g} to {best.latency_q[1]:.3g}) at batch 1, "
        f"{best.images_per_s:.3g} images/s at batch {best.throughput_batch}",
        markup=False,
    )
    out.print(f"measured {'here' if best.here else 'elsewhere'}: {best.target}", markup=False)
    if limit_ms is not None and best.latency_q[1] > limit_ms:
        out.print("Its upper quartile is over the budget: one call in four takes longer.", markup=False)
    if runners_up:
        out.print("\nrunners-up", markup=False)
    for option in runners_up:
        out.print(f"  {option.model}: {compared(best, option)}", markup=False)
    out.print("\nPareto set among what fits: no other is both as accurate and as fast", markup=False)
    grid = table("model", ">top-1 (%)", ">ms", ">images/s", ">size (MB)", ">peak (MB)", "licence", "measured on")
    for option in pareto:
        grid.add_row(
            option.model,
            f"{option.top1:g}",
            f"{option.latency_ms:.3g}",
            f"{option.images_per_s:.4g}",
            "-" if option.size_mb is None else f"{option.size_mb:.1f}",
            "-" if option.memory_mb is None else f"{option.memory_mb:.0f}",
            option.licence or "-",
            ("" if option.here else "elsewhere: ") + option.target,
        )
    out.print(grid)
