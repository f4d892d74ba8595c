"""The CPU implementation in C++, built at first use by torch's extension loader into torch's own cache folder.

Where it cannot be built (no compiler, no ninja) :func:`unavailable` says why, once in the log too, and the vectorised
form takes its place.
"""

import hashlib
import logging
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import reason

SOURCE = Path(__file__).with_name("selective_scan.cpp")

# The instruction sets that torch itself chooses between at run time.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}

_logger = logging.getLogger(__name__)


def compiler() -> str | None:
    """Path of the C++ compiler that torch's loader would use."""
    return shutil.which(os.environ.get("CXX", "c++"))


def ninja() -> str | None:
    """Path of ninja, which torch's loader needs."""
    return shutil.which("ninja")


@cache
def unavailable() -> str | None:
    """Why the kernel cannot be used; None when it is ready. The first call builds and loads it."""
    why = _load()
    if why:
        _logger.info("selective_scan: no C++ kernel (%s); using vectorised PyTorch", why)
    return why


def _load() -> str | None:
    if sys.platform == "win32":
        return "written for GCC and Clang"
    if compiler() is None:
        return "no C++ compiler"
    if ninja() is None:
        return 'no ninja: pip install "efficient-zoo[kernels]"'
    from torch.utils import cpp_extension  # slow to import

    flags = ["-O3", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # not for the linker too: the symbols are then found in the OpenMP library of torch
    version = "\n".join([SOURCE.read_text(encoding="utf-8"), *flags, torch.__version__])
    name = f"zoo_selective_scan_{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    try:
        cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
    except Exception as error:  # whatever a compiler, a linker or a read-only cache folder comes up with
        return f"not built: {reason(error)}"
    return None


def _strided(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors as the kernel takes them: vectors and matrices contiguous, sequences as they are."""
    return [x if x is None or x.ndim > 2 else x.contiguous() for x in tensors]


def forward(*inputs: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """As :func:`zoo.ops.selective_scan.vectorised.forward`."""
    return torch.ops.zoo_cpu.selective_scan_forward(*_strided(*inputs), delta_softplus)


def backward(
    grad_y: Tensor, grad_last_state: Tensor | None, *inputs: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, ...]:
    """As :func:`zoo.ops.selective_scan.vectorised.backward`; gradients of tensors that are not there mean nothing."""
    grad_last_state = None if grad_last_state is None else grad_last_state.contiguous()
    return torch.ops.zoo_cpu.selective_scan_backward(grad_y, grad_last_state, *_strided(*inputs), delta_softplus)
