"""Initialisation after the fact, or not at all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

_lock = threading.Lock()
_inside = 0  # skip_init() that are open, in all threads
_of_thread = threading.local()


def _unless_skipped(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def initialise(first: Any, *args: Any, **kwargs: Any) -> Any:
        return first if getattr(_of_thread, "skips", False) else function(first, *args, **kwargs)

    return initialise


def _initialisers() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What initialises: torch's functions, and the methods of its layers that call them."""
    for name, function in vars(nn.init).items():
        if callable(function) and name.endswith("_") and not name.startswith("_"):
            yield nn.init, name, function
    layers = {base for each in vars(nn).values() if isinstance(each, type) for base in each.__mro__}
    for layer in layers:
        if "reset_parameters" in vars(layer):
            yield layer, "reset_parameters", vars(layer)["reset_parameters"]


_INITIALISERS = [(place, name, function, _unless_skipped(function)) for place, name, function in _initialisers()]


def reset_parameters(module: nn.Module) -> None:
    """Initialise every parameter and buffer in place: children first, then the containers that correct them."""
    submodule: Any
    for submodule in reversed(list(module.modules())):
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()


@contextmanager
def skip_init() -> Iterator[None]:
    """Within it, and in this thread, torch initialises nothing: for a model whose weights come from a file.

    Even on the meta device, which has no values, initialising takes longer than all else of building a model.
    """
    global _inside
    with _lock:
        _inside += 1
        for place, name, _, skipping in _INITIALISERS:
            setattr(place, name, skipping)
    outer = getattr(_of_thread, "skips", False)
    _of_thread.skips = True
    try:
        yield
    finally:
        _of_thread.skips = outer
        with _lock:
            _inside -= 1
            if not _inside:
                for place, name, function, _ in _INITIALISERS:
                    setattr(place, name, function)
