"""Makes zoo's language models known to transformers' Auto classes without importing transformers.

Importing zoo is quick, and transformers takes seconds. So its two Auto modules are waited for: when somebody imports
them, zoo's classes are registered right after, and ``AutoModelForCausalLM.from_pretrained(FOLDER)`` finds them.
"""

import sys
from importlib.machinery import PathFinder
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
# What zoo's model classes are made of. These modules import the two above while they are loading themselves.
_NEEDED = ("transformers.modeling_utils", "transformers.generation.utils")

_loading: set[str] = set()


def await_transformers() -> None:
    """Register zoo's language models as soon as transformers' Auto classes are there; now, if they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]  # importlib.abc takes longer to import than zoo
        for name in (_CONFIGS, _MODELS):
            if name in sys.modules:
                _loaded(name)


def _loaded(name: str) -> None:
    from zoo.models._causal_lm import causal_lms

    if name == _CONFIGS:
        for each in causal_lms():
            each.register_configs()
    elif _MODELS in sys.modules and not _loading:
        for each in causal_lms():
            each.register_models()


class _Finder:
    """Lets the others find a module, and has its loader call us after it ran."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in (_CONFIGS, _MODELS, *_NEEDED):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """A module's own loader, which does what it would have done; everything else is asked of it."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def exec_module(self, module: Any) -> None:
        name = module.__name__
        _loading.add(name)
        try:
            self._own.exec_module(module)
        finally:
            _loading.discard(name)
        _loaded(name)
