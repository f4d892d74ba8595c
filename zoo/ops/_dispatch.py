"""Which implementation of an operator runs: the environment's choice, or the best there is for the device."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import torch

from zoo.errors import ConfigError, nearest
from zoo.ops._extension import Extension


@dataclass(frozen=True)
class Implementation:
    """The one that runs, and why it is the one."""

    name: str  # such as "ref", "cpu" (C++), "torch" (vectorised PyTorch), "triton"
    reason: str
    module: Any  # with the operator's functions, such as forward() and backward()


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operator, and where it can run."""

    name: str
    load: Callable[[], Any]  # gives the module, and imports it if it must
    device: str | None = None  # the only type of device that it runs on
    unavailable: Callable[[], str | None] = lambda: None  # why it cannot be used
    float64: bool = True  # whether it can compute in float64
    reason: Callable[[], str] = lambda: "nothing else is needed"  # why it is taken where no better one is missing
    hint: str = ""  # what would make it available


CHOICES: "dict[str, Choice]" = {}  # of every operator that has been imported, by its name


class Choice:
    """The implementations of one operator, best first, and what chooses among them.

    ``ZOO_<OPERATOR>`` in the environment forces one. ``"ref"`` is always there, and never chosen by itself.
    """

    def __init__(self, operator: str, candidates: Sequence[Candidate], *, reference: Any) -> None:
        self.operator = operator
        self.variable = f"ZOO_{operator.upper()}"
        self.names = ("ref", *(candidate.name for candidate in candidates))
        self._candidates = tuple(candidates)
        self._reference = reference
        CHOICES[operator] = self

    def forced(self) -> str | None:
        """The implementation that the environment asks for.

        Raises:
            ConfigError: If there is none of that name.
        """
        name = os.environ.get(self.variable) or None
        if name is not None and name not in self.names:
            raise ConfigError(
                f"{self.variable} is {name!r}; expected {', '.join(self.names)}.{nearest(name, self.names)}"
            )
        return name

    def route(self) -> str:
        """``"op"``; ``"ref"`` where it is forced, so that autograd differentiates it; ``"export"`` on the way to ONNX.

        To be called through a function under :func:`constant_when_traced`.
        """
        if torch.onnx.is_in_onnx_export():
            return "export"
        return "ref" if self.forced() == "ref" else "op"

    def __call__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Implementation:
        """The implementation for tensors on ``device`` that are computed with in ``dtype``, float32 or float64.

        Raises:
            ConfigError: If the environment asks for one that does not exist or cannot run there.
        """
        name = self.forced()
        if name == "ref":
            return Implementation("ref", f"{self.variable}=ref", self._reference)
        if name is not None:
            candidate = next(each for each in self._candidates if each.name == name)
            interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
            elsewhere = candidate.device not in (None, device.type) and not interpreted
            if elsewhere:
                missing: str | None = f"the tensors are on {device.type!r}"
            elif dtype == torch.float64 and not candidate.float64:
                missing = "it computes in float32 and the tensors are in float64"
            else:
                missing = candidate.unavailable()
            if missing is not None:
                hint = f" {candidate.hint}" if candidate.hint else ""
                raise ConfigError(f"{self.variable}={name}, but {missing}.{hint}")
            return Implementation(name, f"{self.variable}={name}", candidate.load())
        reasons: list[str] = []
        for candidate in self._candidates:
            if candidate.device not in (None, device.type):
                continue
            if dtype == torch.float64 and not candidate.float64:
                missing = f"{candidate.name} computes in float32"
            else:
                missing = candidate.unavailable()
            if missing is None:
                only = candidate.device is None and not reasons
                why = f"there is no kernel for {device.type!r}" if only else " and ".join(reasons) or candidate.reason()
                return Implementation(candidate.name, why, candidate.load())
            reasons.append(missing)
        raise AssertionError("the last candidate runs everywhere")


def constant_when_traced(function: Callable[[], str]) -> Callable[[], str]:
    """``torch.compiler.assume_constant_result``, which only leaves this mark, but imports the whole compiler first."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def triton_unavailable() -> str | None:
    """Why Triton cannot be used."""
    return "Triton is not installed" if util.find_spec("triton") is None else None


def triton(module: str) -> Candidate:
    """Kernels in Triton, in the module of that name, which is not imported before they run."""
    return Candidate(
        "triton",
        lambda: import_module(module),
        device="cuda",
        unavailable=triton_unavailable,
        float64=False,
        reason=lambda: "Triton is installed",
    )


def cpp(
    module: Any,
    extension: Extension,
    *,
    float64: bool = True,
    reason: Callable[[], str] = lambda: "compiled for this processor",
) -> Candidate:
    """Functions in ``module`` that call what ``extension`` builds."""

    def unavailable() -> str | None:
        missing = extension.unavailable()
        return None if missing is None else f"no C++ kernel: {missing}"

    return Candidate("cpu", lambda: module, device="cpu", unavailable=unavailable, float64=float64, reason=reason)
