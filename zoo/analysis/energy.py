"""Joules, where the platform counts them: RAPL of the processor's packages, NVML of a GPU."""

from collections.abc import Callable
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Adds up the joules that a device takes, of all programs on it. To be read more often than its counters wrap.

    Attributes:
        joules: So far; None where nothing counts.
        source: What counts, or why nothing does.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._counters, self.source = _counters(torch.device(device))
        self._last = [read() for read, _ in self._counters]
        self.joules: float | None = 0.0 if self._counters else None

    def update(self) -> None:
        """Add what was taken since the last look. A package of 100 W wraps after some ten minutes."""
        for i, (read, wraps_at) in enumerate(self._counters):
            now, before = read(), self._last[i]
            assert self.joules is not None
            self.joules += now - before if now >= before else now - before + wraps_at
            self._last[i] = now


def _counters(device: torch.device) -> tuple[list[tuple[Callable[[], float], float]], str]:
    """Functions that read joules, each with the value at which it starts again from 0."""
    if device.type == "cuda":
        try:
            import pynvml  # the package nvidia-ml-py

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:  # not installed, no driver, or a GPU that does not count
            return [], f"NVML cannot say ({type(error).__name__})"
        return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)], "NVML, the whole GPU"
    found: list[tuple[Callable[[], float], float]] = []
    for package in sorted(_RAPL.glob("intel-rapl:?")):
        path = package / "energy_uj"
        try:
            path.read_text()
            wraps_at = float((package / "max_energy_range_uj").read_text()) / 1e6
        except OSError:
            continue  # only root may read it on most systems
        found.append((lambda path=path: float(path.read_text()) / 1e6, wraps_at))  # type: ignore[misc]
    return found, "RAPL, whole packages" if found else "no RAPL counters can be read here"
