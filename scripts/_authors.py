"""The authors' own models, from their files, where timm has none."""

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from zoo.pretrained.convert import to_authors


def authors_efficientmod(file: Path, name: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The model of ``models/EfficientMod.py`` of github.com/ma-xu/EfficientMod, with zoo's weights, in eval mode."""
    of_theirs = name.replace("efficientmod", "efficientMod").replace("_conv", "_Conv")
    model: nn.Module = getattr(_load(file), of_theirs)()
    model.load_state_dict(to_authors(state_dict, name))
    return model.eval()


@cache
def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("authors_efficientmod", file)
    if spec is None or spec.loader is None or not file.is_file():
        sys.exit(f"{file} is no Python file; expected models/EfficientMod.py of github.com/ma-xu/EfficientMod.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where timm's register_model looks for it
    spec.loader.exec_module(module)
    return module
