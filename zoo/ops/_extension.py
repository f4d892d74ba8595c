"""C++ operators for CPUs, built at first use by torch's extension loader into torch's own cache folder."""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from zoo.errors import reason

# The instruction sets that torch itself chooses between at run time.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

_logger = logging.getLogger(__name__)
_UNTRIED = "untried"


def compiler() -> str | None:
    """Path of the C++ compiler that torch's loader would use."""
    return shutil.which(os.environ.get("CXX", "c++"))


def ninja() -> str | None:
    """Path of ninja, which torch's loader needs."""
    return shutil.which("ninja")


@contextlib.contextmanager
def without_cuda_warning() -> Iterator[None]:
    """A block that may import torch's extension builder, which warns of CUDA's tools on a machine without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
                _logger.warning("%s: no C++ kernel (%s); using vectorised PyTorch", self.operator, self._unavailable)
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
        from filelock import FileLock

        with without_cuda_warning():
            from torch.utils import cpp_extension  # slow to import

        flags = ["-O3", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), []), *self.flags]
        if sys.platform == "linux":
            flags.append(
                "-fopenmp"
            )  # not for the linker too: the symbols are then found in the OpenMP library of torch
        version = "\n".join([self.source.read_text(encoding="utf-8"), *flags, torch.__version__, sys.platform])
        name = f"zoo_{self.operator}_{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
        library = root / f"{name}.so"  # there once it is whole
        try:
            if not library.exists():
                root.mkdir(parents=True, exist_ok=True)
                # One process builds. The system lifts this lock when its holder is killed; torch's own, a file that the
                # holder removes, would keep every later process waiting.
                with FileLock(library.with_suffix(".lock")):
                    if not library.exists():
                        self._build_and_load(library, flags)
                        return None
            torch.ops.load_library(str(library))
        except Exception as error:  # whatever a compiler, a linker or a read-only cache folder comes up with
            return f"not built: {reason(error)}"
        return None

    def _build_and_load(self, library: Path, flags: list[str]) -> None:
        from torch.utils import cpp_extension

        with TemporaryDirectory(prefix=f"{library.stem}-", dir=library.parent) as folder:
            cpp_extension.load(
                library.stem,
                [str(self.source)],
                extra_cflags=flags,
                build_directory=folder,
                is_python_module=False,
            )
            Path(folder, library.name).replace(library)
