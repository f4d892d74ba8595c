"""Turns a finished run into weights that travel with the package: half precision, evaluated as they are shipped.

    python scripts/package_weights.py runs/efficientvit_m0 efficientvit_m0.zoo_cifar10

Writes weights/<name>.safetensors and prints the figures and the sha256 for the family's manifest.
"""

import argparse
import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file

from zoo.atomic import save_safetensors
from zoo.pretrained.source import overrides_of
from zoo.registry import split_name
from zoo.resources import folder
from zoo.train.evaluate import evaluate_run
from zoo.train.run_folder import ModelRecord, RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("name", help="model.tag")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)

    state = load_file(run.weights)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert all(tensor.isfinite().all() for tensor in half.values()), "half precision overflows"
    target = folder("weights") / f"{arguments.name}.safetensors"
    model, tag = split_name(arguments.name)
    overrides = overrides_of(ModelRecord.read(run).config, model)
    metadata = {"model": model, "tag": tag, "licence": "apache-2.0", "config": json.dumps(overrides)}
    if tokenizer := ModelRecord.read(run).tokenizer:
        metadata["tokenizer"] = tokenizer
    save_safetensors(half, target, metadata)

    figures = evaluate_run(run.path, weights=target)  # of the shipped file, not of the run's float32 weights
    print(f"{target.name}: {target.stat().st_size:,} bytes")
    print(f'sha256 = "{hashlib.sha256(target.read_bytes()).hexdigest()}"')
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
