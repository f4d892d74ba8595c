"""Building blocks that are equal only once, where a network is looked at and not run: when its costs are counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_made: ContextVar["Callable[[Any, Callable[[], nn.Module]], nn.Module] | None"] = ContextVar("made", default=None)


def alike(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """``make(*args, **kwargs)``, for a block of which a network has several; arguments are hashable.

    A new module, except within :func:`equal_once`, where equal arguments may give the same one.
    """
    made = _made.get()
    if made is None:
        return make(*args, **kwargs)
    return made((make, args, tuple(kwargs.items())), lambda: make(*args, **kwargs))


@contextmanager
def equal_once(made: Callable[[Any, Callable[[], nn.Module]], nn.Module]) -> Iterator[None]:
    """Within it, in this thread, blocks come from ``made(key, make)``: equal keys are of equal blocks."""
    token = _made.set(made)
    try:
        yield
    finally:
        _made.reset(token)
