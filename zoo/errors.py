"""Errors that speak to the user: what was wrong, what was expected, and the nearest valid choice.

The command line prints a :class:`ZooError` as one line and exits with its ``exit_code``; anything else is a bug.
"""

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class ZooError(ValueError):
    """Base of every error that names a mistake in what zoo was given."""

    exit_code = 2  # a usage error


class ConfigError(ZooError):
    """A model config with an unknown field, a value of the wrong type, or values that do not fit together."""


class UnknownModelError(ZooError):
    """A model name or weight tag that is not registered."""


class ShapeError(ZooError):
    """Tensors whose shapes, dtypes or devices an operator cannot take together."""


class RecipeError(ZooError):
    """A recipe that cannot be found, parsed, or checked."""


class DataError(ZooError):
    """A data set or picture that cannot be read, or that does not fit the model."""


class WeightsError(ZooError):
    """A weight file that cannot be found, is not what it should be, or does not fit the model."""


class MissingExtraError(ZooError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class ExportError(ZooError):
    """A model that cannot be exported or optimised as asked, or a file of either that cannot be used here."""

    exit_code = 1  # the command was right, the model or the machine does not allow it


class TrainingError(ZooError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be written."""

    exit_code = 1  # the command was right, the run failed


class Preempted(ZooError):
    """Training was asked to stop, by SIGTERM, and has saved a checkpoint."""

    exit_code = 0  # nothing is lost, and who asked is to see that


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """``" Did you mean: a, b?"`` with the choices closest to ``name``, or an empty string when none is close."""
    matches = difflib.get_close_matches(str(name), list(choices), n=count, cutoff=0.5)
    return f" Did you mean: {', '.join(matches)}?" if matches else ""


def reason(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its type's name when it says nothing."""
    return next(iter(str(error).splitlines()), "").rstrip(". ") or type(error).__name__


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional package where it is needed.

    Raises:
        MissingExtraError: If it is not installed; the message names the extra to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(f'{why} needs {package}: pip install "efficient-zoo[{extra}]"') from error
