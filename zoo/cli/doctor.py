"""``zoo doctor``"""

from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what zoo runs on: versions, devices, and which implementation of each operator is used and why."""
    from zoo.cli._output import console, print_json, table

    facts = examine()
    if as_json:
        print_json(facts)
        return
    out = console()
    for title, entries in facts.items():
        grid = table(title, "")
        for name, value in entries.items():
            grid.add_row(name, "not found" if value is None else str(value))
        out.print(grid)


def examine() -> dict[str, dict[str, Any]]:
    """What ``zoo doctor`` shows, by section. The C++ operators are built, if they never were."""
    import platform
    from importlib import metadata

    import torch

    import zoo
    import zoo.ops  # the operators register what they choose from
    from zoo.errors import ConfigError
    from zoo.ops._dispatch import CHOICES
    from zoo.ops._extension import compiler, ninja

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    operators = {}
    for operator, choose in CHOICES.items():
        for device in devices:
            try:
                chosen = choose(torch.device(device))
                operators[f"{operator} on {device}"] = f"{chosen.name}: {chosen.reason}"
            except ConfigError as error:
                operators[f"{operator} on {device}"] = f"none: {error}"
    packages = ("torch", "torchvision", "timm", "triton", "mamba-ssm", "onnx", "onnxruntime")
    return {
        "versions": {
            "zoo": zoo.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "devices": devices,
        "tools": {"C++ compiler": compiler(), "ninja": ninja()},
        "operators": operators,
    }
