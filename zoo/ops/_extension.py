"""C++ operators for CPUs, built at first use by torch's extension loader into torch's own cache folder."""

import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path

import torch

from zoo.errors import reason

# The instruction sets that torch itself chooses between at run time.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}

_logger = logging.getLogger(__name__)
_UNTRIED = "untried"


def compiler() -> str | None:
    """Path of the C++ compiler that torch's loader would use."""
    return shutil.which(os.environ.get("CXX", "c++"))


def ninja() -> str | None:
    """Path of ninja, which torch's loader needs."""
    return shutil.which("ninja")


class Extension:
    """The C++ half of an operator, which registers what it defines under ``torch.ops`` when it is loaded.

    Where it cannot be built (no compiler, no ninja), :meth:`unavailable` says why, once in the log too, and another
    implementation takes its place.
    """

    def __init__(self, operator: str, source: Path, *, flags: tuple[str, ...] = ()) -> None:
        self.operator = operator
        self.source = source
        self.flags = flags  # for the compiler, besides the usual ones
        self._unavailable: str | None = _UNTRIED

    def unavailable(self) -> str | None:
        """Why the operator cannot be used; None when it is ready. The first call builds and loads it."""
        if self._unavailable is _UNTRIED:
            self._unavailable = self._load()
            if self._unavailable:
                _logger.info("%s: no C++ kernel (%s); using vectorised PyTorch", self.operator, self._unavailable)
        return self._unavailable

    @property
    def ready(self) -> bool:
        """Whether it has been built and loaded in this process."""
        return self._unavailable is None

    def forget(self) -> None:
        """Try again at the next use."""
        self._unavailable = _UNTRIED

    def _load(self) -> str | None:
        if sys.platform == "win32":
            return "written for GCC and Clang"
        if compiler() is None:
            return "no C++ compiler"
        if ninja() is None:
            return 'no ninja: pip install "efficient-zoo[kernels]"'
        from torch.utils import cpp_extension  # slow to import

        flags = ["-O3", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), []), *self.flags]
        if sys.platform == "linux":
            flags.append(
                "-fopenmp"
            )  # not for the linker too: the symbols are then found in the OpenMP library of torch
        version = "\n".join([self.source.read_text(encoding="utf-8"), *flags, torch.__version__, sys.platform])
        name = f"zoo_{self.operator}_{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        folder = Path(root) / name
        built, whole = folder / f"{name}.so", folder / "whole"  # the latter is there once the former is
        try:
            if whole.exists():  # ninja would build it anew for a source at another path
                torch.ops.load_library(str(built))
                return None
            folder.mkdir(parents=True, exist_ok=True)
            cpp_extension.load(
                name, [str(self.source)], extra_cflags=flags, build_directory=str(folder), is_python_module=False
            )
            whole.touch()
        except Exception as error:  # whatever a compiler, a linker or a read-only cache folder comes up with
            return f"not built: {reason(error)}"
        return None
