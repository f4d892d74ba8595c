"""Which implementation of the selective scan runs: the environment's choice, or the best there is for the device."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch

from zoo.errors import ConfigError, nearest
from zoo.ops.selective_scan import cpu, mamba, vectorised
from zoo.ops.selective_scan.reference import selective_scan_reference

VARIABLE = "ZOO_SELECTIVE_SCAN"
CHOICES = ("ref", "cpu", "torch", "triton", "mamba")


@dataclass(frozen=True)
class Implementation:
    """One of the implementations, and why it is the one."""

    name: str  # "ref", "cpu" (C++), "torch" (vectorised PyTorch), "triton" or "mamba"
    reason: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def forced() -> str | None:
    """The implementation that the environment variable ``ZOO_SELECTIVE_SCAN`` asks for.

    Raises:
        ConfigError: If there is none of that name.
    """
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {name!r}; expected {', '.join(CHOICES)}.{nearest(name, CHOICES)}")
    return name


def choose(device: torch.device, dtype: torch.dtype = torch.float32) -> Implementation:
    """The implementation for tensors on ``device`` that are computed with in ``dtype``, float32 or float64.

    Raises:
        ConfigError: If the environment asks for one that does not exist or cannot run there.
    """
    name = forced()
    why = f"{VARIABLE}={name}" if name else ""
    if name == "cpu":
        if device.type != "cpu":
            raise ConfigError(f"{VARIABLE}=cpu, but the tensors are on {device.type!r}.")
        return _cpu(why)
    if name == "triton":
        missing = _triton_unavailable(device)
        if missing:
            raise ConfigError(f"{VARIABLE}=triton, but {missing}.")
        return _triton(why)
    if name == "mamba":
        missing = mamba.unavailable() if device.type == "cuda" else f"the tensors are on {device.type!r}"
        if missing:
            hint = 'It needs a CUDA GPU and pip install "efficient-zoo[cuda]".'
            raise ConfigError(f"{VARIABLE}=mamba, but {missing}. {hint}")
        return _mamba(why)
    if name == "torch":
        return _torch(why)
    if name == "ref":  # selective_scan() does not come here: nothing inside an operator is seen by autograd
        return Implementation("ref", why, selective_scan_reference, vectorised.backward)
    return _best(device, dtype)


def _best(device: torch.device, dtype: torch.dtype) -> Implementation:
    if device.type == "cpu":
        return _cpu("compiled for this processor")
    if device.type != "cuda":
        return _torch(f"there is no kernel for {device.type!r}")
    if dtype == torch.float64:
        return _torch("the CUDA kernels compute in float32")
    no_mamba = mamba.unavailable()
    if no_mamba is None:
        return _mamba("mamba-ssm is installed")
    no_triton = _triton_unavailable(device)
    return _triton(no_mamba) if no_triton is None else _torch(f"{no_mamba} and {no_triton}")


def _cpu(why: str) -> Implementation:
    missing = cpu.unavailable()
    if missing is not None:
        return _torch(f"no C++ kernel: {missing}")
    return Implementation("cpu", why, cpu.forward, cpu.backward)


def _torch(why: str) -> Implementation:
    return Implementation("torch", why, vectorised.forward, vectorised.backward)


def _triton(why: str) -> Implementation:
    from zoo.ops.selective_scan import triton_impl

    return Implementation("triton", why, triton_impl.forward, triton_impl.backward)


def _mamba(why: str) -> Implementation:
    return Implementation("mamba", why, mamba.forward, mamba.backward)


def _triton_unavailable(device: torch.device) -> str | None:
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type!r}"
    return None
