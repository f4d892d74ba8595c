"""Initialisation after the fact, or not at all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

_INITIALISERS: dict[str, Callable[..., Tensor]] = {
    name: function
    for name, function in vars(nn.init).items()
    if callable(function) and name.endswith("_") and not name.startswith("_")
}
_lock = threading.Lock()
_inside = 0  # skip_init() that are open, in all threads
_of_thread = threading.local()


def reset_parameters(module: nn.Module) -> None:
    """Initialise every parameter and buffer in place: children first, then the containers that correct them."""
    submodule: Any
    for submodule in reversed(list(module.modules())):
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()


@contextmanager
def skip_init() -> Iterator[None]:
    """Within it, and in this thread, ``torch.nn.init`` changes nothing: for a model whose weights come from a file.

    Even on the meta device, which has no values, initialising takes longer than all else of building a model.
    """
    global _inside
    with _lock:
        _inside += 1
        for name, function in _INITIALISERS.items():
            setattr(nn.init, name, _unless_skipped(function))
    outer = getattr(_of_thread, "skips", False)
    _of_thread.skips = True
    try:
        yield
    finally:
        _of_thread.skips = outer
        with _lock:
            _inside -= 1
            if not _inside:
                for name, function in _INITIALISERS.items():
                    setattr(nn.init, name, function)


def _unless_skipped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def initialise(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if getattr(_of_thread, "skips", False) else function(tensor, *args, **kwargs)

    return initialise
