"""The six metrics of EfficientLLM (arXiv:2505.13840) for a language model that reads a prompt and writes on.

Names are the paper's; what is measured under them here:

* AMU, memory utilisation: memory in use, averaged over the tokens written, in bytes and in percent of the device's.
* PCU, compute utilisation: MACs a second / the machine's measured peak, the higher of reading and writing, in percent.
* AL, latency: of a token written, averaged over the tokens; and of the first, which comes after reading the prompt.
* IT, throughput: tokens a second, reading and writing. (Training throughputs, TT and ST, are what a run reports.)
* AEC, energy: joules for each token written, where the platform counts them (RAPL of the processor's packages, NVML of
  the GPU, other processes included); else None, "not measured".
* MCR, compression rate: bytes that the parameters would take at 16 bits / bytes that they take. The paper weighs it
  with the change in task performance; that is not measured here.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.analysis.bench import Conditions, as_measured, example_input
from zoo.analysis.benchmark import measure, memory_in_use, torch_threads, weight_bytes
from zoo.analysis.energy import EnergyMeter
from zoo.analysis.profile import Peaks, measure_peaks
from zoo.analysis.trace import trace
from zoo.config import TextConfig
from zoo.deploy.program import DTYPES
from zoo.errors import ConfigError


@dataclass(frozen=True)
class SixMetrics:
    """EfficientLLM's metrics of one model under one set of conditions. None is "not measured"."""

    model: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    amu_bytes: float | None
    amu_percent: float | None
    pcu_percent: float
    al_ms: float  # a token written
    al_quartiles_ms: tuple[float, float]
    first_token_ms: float
    it_tokens_per_s: float  # written, of the whole batch
    prompt_tokens_per_s: float
    aec_joules_per_token: float | None
    energy_source: str  # what counted the joules, or why nothing did
    mcr: float

    def rows(self) -> list[tuple[str, str, str]]:
        """(abbreviation, name, value with unit) of each metric, for people."""
        missing = "not measured"
        memory = missing if self.amu_bytes is None else f"{self.amu_bytes / 1e6:.0f} MB"
        if self.amu_percent is not None:
            memory += f", {self.amu_percent:.1f} % of the device's"
        low, high = self.al_quartiles_ms
        latency = f"{self.al_ms:.3g} ms/token ({low:.3g} to {high:.3g}), first {self.first_token_ms:.3g} ms"
        energy = f"{missing}: {self.energy_source}"
        if self.aec_joules_per_token is not None:
            energy = f"{self.aec_joules_per_token:.3g} J/token ({self.energy_source})"
        return [
            ("AMU", "memory utilisation", memory),
            ("PCU", "compute utilisation", f"{self.pcu_percent:.1f} % of the measured peak"),
            ("AL", "latency", latency),
            ("IT", "throughput", f"{self.it_tokens_per_s:.4g} tokens/s written, {self.prompt_tokens_per_s:.4g} read"),
            ("AEC", "energy", energy),
            ("MCR", "compression rate", f"{self.mcr:.2f} (size with 16-bit parameters / size)"),
        ]


def six_metrics(
    model: str | TextConfig,
    *,
    batch: int = 1,
    new_tokens: int = 32,
    conditions: Conditions | None = None,
    peaks: Peaks | None = None,
) -> SixMetrics:
    """Measure a language model by name or config, with random weights; ``conditions.tokens`` is the prompt's length.

    Raises:
        ConfigError: If it is no language model, or a number is below 1.
        UnknownModelError: If there is no such model.
    """
    conditions = conditions or Conditions()
    conditions.check()
    if conditions.in_engine:
        raise ConfigError(f"backend is {conditions.backend!r}; expected eager or compile: the six metrics write text.")
    if batch < 1 or new_tokens < 1:
        raise ConfigError(f"batch is {batch} and new_tokens {new_tokens}; expected at least 1.")
    config = zoo.get_config(model) if isinstance(model, str) else model
    if not isinstance(config, TextConfig):
        raise ConfigError(f"{model} is no language model; the six metrics are of tokens.")
    from zoo.models._causal_lm import cache_of

    with torch_threads(conditions.threads):
        peaks = peaks or measure_peaks(conditions)
        network = as_measured(zoo.build(config), conditions)
        prompt = example_input(config, batch, tokens=conditions.tokens, device=conditions.device)
        memory: list[int] = []

        def read() -> Any:
            with torch.inference_mode():
                return network(prompt, use_cache=True, logits_to_keep=1)

        def write(after_each: Callable[[], object] = lambda: None) -> None:
            out = read()
            with torch.inference_mode():
                for _ in range(new_tokens):
                    token = out.logits[:, -1:].argmax(-1).flatten()[:batch].view(batch, 1)
                    out = network(token, cache=cache_of(out), use_cache=True, logits_to_keep=1)
                    after_each()

        in_use = memory_in_use(conditions.device)
        if in_use is not None:
            write(lambda: memory.append(memory_in_use(conditions.device) or 0))
        timings = measure(
            {"read": read, "write": write},
            device=conditions.device,
            threads=conditions.threads,
            clock=conditions.clock,
            rounds=conditions.rounds,
        )
        meter = EnergyMeter(conditions.device)
        write()
        if torch.device(conditions.device).type != "cpu":
            torch.accelerator.synchronize(conditions.device)
        meter.update()
        energy, source = meter.joules, meter.source
        reading = sum(operator.macs for operator in trace(network, prompt, use_cache=True, logits_to_keep=1))
        first: Tensor = prompt[:, :1]
        writing = sum(operator.macs for operator in trace(network, first, use_cache=True, logits_to_keep=1))
    first_s = timings["read"].median
    steps = [
        max(whole - start, 1e-9) / new_tokens
        for whole, start in zip(timings["write"].rounds, timings["read"].rounds, strict=True)
    ]
    step_s = statistics.median(steps)
    spread = replace(timings["write"], rounds=tuple(steps)).quartiles
    rate = max(reading / first_s, writing / step_s)
    amu = statistics.mean(memory) if memory else None
    total = _device_memory(conditions.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return SixMetrics(
        model=model if isinstance(model, str) else type(config).__name__,
        batch=batch,
        prompt_tokens=conditions.tokens,
        new_tokens=new_tokens,
        amu_bytes=amu,
        amu_percent=100 * amu / total if amu is not None and total else None,
        pcu_percent=100 * rate / peaks.macs_per_s,
        al_ms=1e3 * step_s,
        al_quartiles_ms=(1e3 * spread[0], 1e3 * spread[1]),
        first_token_ms=1e3 * first_s,
        it_tokens_per_s=batch / step_s,
        prompt_tokens_per_s=batch * conditions.tokens / first_s,
        aec_joules_per_token=None if energy is None else energy / (batch * new_tokens),
        energy_source=source,
        mcr=parameters * DTYPES["fp16"].itemsize / weight_bytes(network),
    )


def _device_memory(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    info = Path("/proc/meminfo")
    if torch.device(device).type != "cpu" or not info.is_file():
        return None
    return int(info.read_text().split("MemTotal:")[1].split()[0]) * 1024
