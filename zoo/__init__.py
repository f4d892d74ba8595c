"""zoo: find, build, scale, train, fine-tune, measure and ship efficient models.

import zoo
model = zoo.create_model("efficientvit_m5", pretrained=True)

Importing this package loads neither torch, timm nor transformers: every public name below is fetched from its module on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo._transformers import await_transformers

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "ConfigError": "zoo.errors",
    "DataError": "zoo.errors",
    "MissingExtraError": "zoo.errors",
    "RecipeError": "zoo.errors",
    "TrainingError": "zoo.errors",
    "UnknownModelError": "zoo.errors",
    "WeightsError": "zoo.errors",
    "ZooError": "zoo.errors",
    "ImageConfig": "zoo.config",
    "ModelConfig": "zoo.config",
    "TextConfig": "zoo.config",
    "axis": "zoo.config",
    "config_from_dict": "zoo.registry",
    "config_from_json": "zoo.registry",
    "Family": "zoo.registry",
    "get_config": "zoo.registry",
    "is_model": "zoo.registry",
    "list_models": "zoo.registry",
    "register": "zoo.registry",
    "build": "zoo.factory",
    "builders": "zoo.builders",  # a module
    "create_model": "zoo.factory",
    "export": "zoo.deploy.export",
    "load_optimized": "zoo.deploy.artefact",
    "optimize": "zoo.deploy.optimize",
    "convert_state_dict": "zoo.pretrained.convert",
    "convert_to_recursive": "zoo.pretrained.recursive",
    "get_weights": "zoo.pretrained.manifest",
    "list_weights": "zoo.pretrained.manifest",
    "load_recipe": "zoo.train.recipe",
    "scale": "zoo.scaling",
}

if TYPE_CHECKING:
    from zoo import builders
    from zoo.config import ImageConfig, ModelConfig, TextConfig, axis
    from zoo.deploy.artefact import load_optimized
    from zoo.deploy.export import export
    from zoo.deploy.optimize import optimize
    from zoo.errors import (
        ConfigError,
        DataError,
        MissingExtraError,
        RecipeError,
        TrainingError,
        UnknownModelError,
        WeightsError,
        ZooError,
    )
    from zoo.factory import build, create_model
    from zoo.pretrained.convert import convert_state_dict
    from zoo.pretrained.manifest import get_weights, list_weights
    from zoo.pretrained.recursive import convert_to_recursive
    from zoo.registry import (
        Family,
        config_from_dict,
        config_from_json,
        get_config,
        is_model,
        list_models,
        register,
    )
    from zoo.scaling import scale
    from zoo.train.recipe import load_recipe

__all__ = [
    "ConfigError",
    "DataError",
    "Family",
    "ImageConfig",
    "MissingExtraError",
    "ModelConfig",
    "RecipeError",
    "TextConfig",
    "TrainingError",
    "UnknownModelError",
    "WeightsError",
    "ZooError",
    "__version__",
    "axis",
    "build",
    "builders",
    "config_from_dict",
    "config_from_json",
    "convert_state_dict",
    "convert_to_recursive",
    "create_model",
    "export",
    "get_config",
    "get_weights",
    "is_model",
    "list_models",
    "list_weights",
    "load_optimized",
    "load_recipe",
    "optimize",
    "register",
    "scale",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = import_module(_PUBLIC[name])
        return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


await_transformers()  # so that its Auto classes know zoo's language models
