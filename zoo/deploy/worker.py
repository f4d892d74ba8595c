"""The process in which a candidate is built and run for the first time: what crashes here crashes alone.

    python -m zoo.deploy.worker FOLDER

``FOLDER/job.json`` says what to do; ``result.json`` and ``outputs.safetensors`` are the answer.
"""

import json
import sys
import time
from pathlib import Path

from zoo.atomic import load_safetensors, save_safetensors, write_atomically
from zoo.deploy.engines import BUILT_HERE, Job, get_engine, silence_telemetry
from zoo.errors import reason


def main(folder: Path) -> None:
    """Build, load and run what ``job.json`` asks for; an error is an answer too."""
    import torch

    silence_telemetry()
    work = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    job = Job(**work["job"])
    torch.set_num_threads(job.threads)
    engine = get_engine(job.engine, work["place"])
    answer: dict[str, float | str]
    try:
        start = time.perf_counter()
        engine.build(Path(work["source"]), folder / BUILT_HERE, job)
        built = time.perf_counter()
        run = engine.load(folder / BUILT_HERE, job)
        device = torch.device(job.target)
        stored = load_safetensors(work["inputs"])
        outputs = {}
        for i in range(work["checks"]):
            inputs = [stored[f"{i}.{k}"].to(device) for k in range(work["arity"])]
            for k, output in enumerate(run(*inputs)):
                outputs[f"{i}.{k}"] = output.float().cpu().clone()
        save_safetensors(outputs, folder / "outputs.safetensors")
        answer = {"build_s": round(built - start, 2), "load_s": round(time.perf_counter() - built, 2)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {reason(error)}"}
    with write_atomically(folder / "result.json") as file:
        file.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
