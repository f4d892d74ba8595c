"""What loading weights costs: zoo against timm, side by side, and checking a file against sha256sum.

    python scripts/benchmark_weights.py [--rounds 9]

1. ``create_model(NAME, pretrained=True)`` from huggingface_hub's cache, warm and offline, against ``timm.create_model``
   of its model of the same name from the same file.
2. The peak of memory that zoo's adds, in a fresh process, against the size of the file.
3. A file of 1 GB, hashed as it is checked before it is loaded, against ``sha256sum``.

The files hold random weights and are put into a cache of the benchmark's own, so nothing is downloaded. CPU seconds,
interleaved, medians; with one thread, a busy machine changes them little.
"""

import argparse
import hashlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _timing import in_turns, seconds_of

MODELS = {"efficientvit_m5": "efficientvit_m5.r224_in1k", "efficientformer_l7": "efficientformer_l7.snap_dist_in1k"}
COMMIT = "0" * 40

MEMORY = """
import sys, torch, zoo
from zoo.pretrained.fetch import fetch
torch.set_num_threads(1)
zoo.create_model("efficientvit_m0", device="cpu")  # what a first model loads besides weights
fetch(zoo.get_weights({name!r}))
def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak starts anew
model = zoo.create_model({name!r}, pretrained=True)
print(1024 * (kilobytes("VmHWM") - before))
"""


def fill_cache(hub: Path, tagged: str, file: Path) -> Path:
    """Put a file where huggingface_hub would have put it."""
    import zoo

    weights = zoo.get_weights(tagged)
    root = hub / f"models--{weights.hub.replace('/', '--')}"
    blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    pointer = root / "snapshots" / COMMIT / weights.file
    for path in (blob, pointer, root / "refs" / weights.revision):
        path.parent.mkdir(parents=True, exist_ok=True)
    file.rename(blob)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    (root / "refs" / weights.revision).write_text(COMMIT)
    return blob


def cpu_seconds(call: Callable[[], object]) -> float:
    return seconds_of(call, time.process_time)


def child_cpu_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def medians(rounds: int, **timers: Callable[[], float]) -> dict[str, float]:
    """The median of each timer, in turns."""
    return {name: statistics.median(seconds) for name, seconds in in_turns(rounds, timers).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each side")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ.update(HF_HOME=folder, HF_HUB_OFFLINE="1")  # read when they are imported
        import timm
        import torch

        import zoo
        from zoo.atomic import save_safetensors
        from zoo.pretrained.files import sha256_of

        torch.set_num_threads(arguments.threads)
        print(
            f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"timm {timm.__version__}, {arguments.threads} thread(s), {rounds} rounds, CPU time"
        )
        for name, tagged in MODELS.items():
            file = home / "model.safetensors"
            # timm's own, since its files may hold what zoo computes.
            save_safetensors(timm.create_model(name).state_dict(), file)
            blob = fill_cache(home / "hub", tagged, file)
            size = blob.stat().st_size
            median = medians(
                rounds,
                zoo=lambda tagged=tagged: cpu_seconds(lambda: zoo.create_model(tagged, pretrained=True)),
                timm=lambda tagged=tagged: cpu_seconds(lambda: timm.create_model(tagged, pretrained=True)),
                read=lambda blob=blob: cpu_seconds(blob.read_bytes),
            )
            done = subprocess.run(
                [sys.executable, "-c", MEMORY.format(name=tagged)], capture_output=True, text=True, check=True
            )
            print(
                f"{tagged} ({size / 1e6:.0f} MB): zoo {1e3 * median['zoo']:.0f} ms, "
                f"timm {1e3 * median['timm']:.0f} ms, "
                f"zoo / timm {median['zoo'] / median['timm']:.3f}; reading alone {1e3 * median['read']:.0f} ms; "
                f"peak memory / file {int(done.stdout) / size:.3f}"
            )
        large = home / "1gb"
        with large.open("wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 24))
        median = medians(
            rounds,
            zoo=lambda: cpu_seconds(lambda: sha256_of(large)),
            sha256sum=lambda: child_cpu_seconds("sha256sum", str(large)),
        )
        print(
            f"sha256 of {large.stat().st_size / 1e9:.2f} GB: zoo {median['zoo']:.2f} s, sha256sum "
            f"{median['sha256sum']:.2f} s, zoo / sha256sum {median['zoo'] / median['sha256sum']:.3f}"
        )


if __name__ == "__main__":
    main()
