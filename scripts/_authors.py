"""The authors' own models, from their files, where timm has none."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from zoo.pretrained.convert import to_authors


def authors_efficientmod(file: Path, name: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The model of ``models/EfficientMod.py`` of github.com/ma-xu/EfficientMod, with zoo's weights, in eval mode."""
    spec = importlib.util.spec_from_file_location("authors_efficientmod", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where timm's register_model looks for it
    spec.loader.exec_module(module)
    model: nn.Module = getattr(module, name.replace("efficientmod", "efficientMod").replace("_conv", "_Conv"))()
    model.load_state_dict(to_authors(dict(state_dict), name))
    return model.eval()
