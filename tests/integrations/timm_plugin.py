"""pytest plugin for timm's own ``tests/test_models.py``: the models it collects are zoo's, and nothing else runs.

Loaded with ``-p timm_plugin`` before that file is imported, so that its ``from timm import list_models`` gets ours.
"""

import fnmatch
from collections.abc import Iterable

import pytest
import timm
from timm.models import get_pretrained_cfg

import zoo.integrations.timm

NAMES = zoo.integrations.timm.register()
_list_models = timm.list_models


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """timm's, of zoo's models alone. No exclusion and no choice of modules applies to them: that is the strictest form.

    With ``pretrained``, only weights on disk are listed, as tests make no network call.
    """
    names = _list_models("zoo_*", pretrained=pretrained, name_matches_cfg=name_matches_cfg, include_tags=include_tags)
    wanted = [filter] if isinstance(filter, str) else list(filter)
    if any(wanted):
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    return [name for name in names if not pretrained or get_pretrained_cfg(name).file]


def list_pretrained(filter: str = "", exclude_filters: str = "") -> list[str]:
    return list_models(filter, pretrained=True, include_tags=True)


timm.list_models = list_models
timm.list_pretrained = list_pretrained


def _model_name(item: pytest.Item) -> str:
    return str(item.callspec.params.get("model_name", "")) if hasattr(item, "callspec") else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of timm's own models, and tell the report which model each remaining one is of."""
    config.hook.pytest_deselected(items=[item for item in items if not _model_name(item).startswith("zoo_")])
    items[:] = [item for item in items if _model_name(item).startswith("zoo_")]
    for item in items:
        item.user_properties.append(("model_name", _model_name(item)))
