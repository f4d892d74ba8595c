"""What the tests of Triton kernels share: interpreting them, and compiling them for a GPU that need not be there."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def interpret() -> Callable[..., None]:
    """Runs a script where Triton interprets and an operator is forced to it; the test files are modules to it."""
    pytest.importorskip("triton")

    def run(script: str, variable: str, timeout: float = 300) -> None:
        here = Path(__file__).parent
        folders = [str(here), str(here.with_name("helpers"))]
        environment = {**os.environ, "TRITON_INTERPRET": "1", variable: "triton"}
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}\n{script}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture
def compile_kernel() -> Callable[..., None]:
    """Compiles a kernel to machine code, given its constants and the types of arguments that are no ``*fp32``."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def run(function: Any, constants: dict[str, Any], types: dict[str, str]) -> None:
        if not isinstance(function, triton.JITFunction):
            pytest.skip("Triton interprets here")
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32")
            for name in inspect.signature(function.fn).parameters
        }
        source = ASTSource(function, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]

    return run
