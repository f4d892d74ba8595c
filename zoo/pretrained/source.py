"""Weights that lie anywhere, described as the manifests describe theirs.

A source is one of::

    efficientvit_m5, efficientvit_m5.r224_in1k      a model's default weights, or those of a tag
    hf-hub:owner/name, hf-hub:owner/name@revision   a Hub repository with config.json and model.safetensors
    local-dir:FOLDER                                the same in a folder, or a run folder
    FILE.safetensors                                a file that zoo wrote, whose header names the model
    https://host/FILE.safetensors#sha256=...        the same, with the hash that it must have

Two layouts of ``config.json`` are read besides the run folder's: timm's for pictures, and transformers' for text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urldefrag

from zoo.config import Axis, ImageConfig, ModelConfig
from zoo.errors import ConfigError, UnknownModelError, WeightsError, reason
from zoo.preprocessing import Preprocessing
from zoo.pretrained.download import hub_file, url_file
from zoo.pretrained.files import read_header
from zoo.pretrained.manifest import LABEL_SETS, REPOSITORY, REVISION, SHA256, Weights, get_weights, list_weights
from zoo.registry import family_name, get_config, get_family, split_name

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FOREIGN_TYPES = {"hgrn_bit": "matmulfree"}  # model_type of others' checkpoints -> the family that reads them
TIMM_PREFIX = "zoo_"  # of zoo's models in timm's registry
MULTI_LABEL = "multi_label_classification"  # transformers' word for it, in a config's problem_type

_HUB = re.compile(f"({REPOSITORY.pattern})(?:@({REVISION.pattern}))?")
_MAX_DEPTH = 1024  # of a config that comes from elsewhere: building takes time in proportion
_MAX_NUMBER = 1 << 20


def is_source(name: str | Path) -> bool:
    """Whether this names weights by their place, and not a model."""
    name = str(name)
    return name.startswith(("hf-hub:", "hf_hub:", "local-dir:", "https://", "http://")) or name.endswith(".safetensors")


def find_weights(source: str | Path) -> Weights:
    """The description of a set of weights, wherever it lies; its tensors may not have been downloaded yet.

    Raises:
        UnknownModelError: If it is of a model that zoo does not have.
        WeightsError: If there is none, or its description cannot be read.
    """
    source = str(source)
    scheme, _, rest = source.partition(":")
    if scheme in ("hf-hub", "hf_hub"):
        repo, revision = _split_hub(rest)
        config = hub_file(repo, CONFIG_FILE, revision)
        # Both files of one commit: the cache files the config under it.
        commit = config.parent.name if re.fullmatch(r"[0-9a-f]{40}", config.parent.name) else revision
        return _described(_read_json(config), source, {"hub": repo, "revision": commit, "folder": config.parent})
    if scheme == "local-dir":
        folder = Path(rest)
        return _described(_read_json(folder / CONFIG_FILE), source, {"folder": folder})
    if is_source(source):
        return _from_header(weights_file(source), source)
    return get_weights(source)


def weights_file(source: str | Path) -> Path:
    """The local file of a source that is given for its tensors alone: nothing but they need be there.

    Raises:
        WeightsError: If it cannot be had.
    """
    scheme, _, rest = str(source).partition(":")
    if scheme in ("hf-hub", "hf_hub"):
        repo, revision = _split_hub(rest)
        return hub_file(repo, WEIGHTS_FILE, revision)
    if scheme == "local-dir":
        return Path(rest) / WEIGHTS_FILE
    if scheme in ("http", "https"):
        url, fragment = urldefrag(str(source))
        sha256 = parse_qs(fragment).get("sha256", [""])[0].lower()
        if not SHA256.fullmatch(sha256):
            raise WeightsError(
                f"{url}: add the hash of the file, #sha256=<64 hexadecimal digits>; none is loaded without."
            )
        return url_file(url, sha256)
    return Path(source)


def _split_hub(name: str) -> tuple[str, str]:
    match = _HUB.fullmatch(name)
    if match is None:
        raise WeightsError(f"{name!r} is no Hub repository; expected owner/name or owner/name@revision.")
    return match[1], match[2] or "main"


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path.parent}: no {path.name} there; expected a folder with it and {WEIGHTS_FILE}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def _described(values: Mapping[str, Any], source: str, place: Mapping[str, Any]) -> Weights:
    """The record of a repository or a folder, from what its config.json says."""
    layouts = {"architecture": _from_timm, "model_type": _from_transformers, "preprocessing": _from_run}
    read = next((layout for key, layout in layouts.items() if key in values), None)
    if read is None:
        raise WeightsError(
            f"{source}: its {CONFIG_FILE} has none of {', '.join(layouts)}; expected one that zoo reads."
        )
    try:
        found = read(values)
        model = found["model"]
        config = get_config(model).override(**found["config"])
        _check_size(config)
        return Weights(
            **{"tag": "", "licence": "unknown", "layout": "zoo", **found, **place},
            family=family_name(model),
        )
    except UnknownModelError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{source}: its {CONFIG_FILE} does not describe a model of zoo's: {reason(error)}."
        ) from error


def _from_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """timm's layout; what once was one dictionary is now two."""
    cfg = values.get("pretrained_cfg", values)
    model = values["architecture"].removeprefix(TIMM_PREFIX)
    config = dict(values.get("model_args") or {})
    own = get_config(model)
    if not isinstance(own, ImageConfig):
        raise ConfigError(f"{model} is no image model")
    channels, height, width = cfg.get("input_size", (3, *own.input_hw))
    classes = values.get("num_classes", cfg.get("num_classes", own.num_classes))
    implied = {"in_chans": channels, "num_classes": classes, "img_size": height if height == width else (height, width)}
    current = {"in_chans": own.in_chans, "num_classes": own.num_classes, "img_size": own.img_size}
    config = {**{name: value for name, value in implied.items() if value != current[name]}, **config}
    given = {key: cfg[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std") if cfg.get(key)}
    labels = values.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    if isinstance(labels, Mapping):  # class number -> name, where some have none
        labels = [labels.get(str(i), str(i)) for i in range(classes)]
    return {
        "model": model,
        "tag": cfg.get("tag") or "",
        "config": config,
        "preprocessing": Preprocessing(img_size=(height, width), **given),
        "labels": tuple(map(str, labels)) if labels else _standard_labels(classes),
        "multi_label": values.get("problem_type") == MULTI_LABEL,
        "licence": cfg.get("license") or "unknown",
    }


def _from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' layout: the fields of the family's config, among those that transformers adds."""
    model_type = str(values["model_type"])
    name = model_type.removeprefix(TIMM_PREFIX)
    family = get_family(FOREIGN_TYPES.get(name, name))
    model = next(iter(family.variants))
    names = {spec.name for spec in dataclasses.fields(family.config)}
    translate = getattr(family.model, "foreign", {}).get(model_type)
    values = {**values, **translate(values)} if translate else values
    config = {name: value for name, value in values.items() if name in names}
    wanted = family.config.from_dict(config)
    model = next((name for name, variant in family.variants.items() if variant() == wanted), model)
    return {
        "model": model,
        "config": wanted.to_dict(),
        "licence": values.get("license") or "unknown",
        "tokenizer": str(values.get("tokenizer") or ""),
    }


def _from_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run folder's, which :class:`zoo.train.run_folder.ModelRecord` writes."""
    config = dict(values["config"])
    config.pop("family")
    return {
        "model": split_name(values["name"])[0],
        "config": config,
        **({"preprocessing": Preprocessing.from_dict(values["preprocessing"])} if values["preprocessing"] else {}),
        "labels": tuple(values["labels"]),
        "multi_label": values.get("multi_label", False),
        "tokenizer": values.get("tokenizer", ""),
    }


def _from_header(path: Path, source: str) -> Weights:
    """The record of a single file, from what zoo wrote into its header."""
    metadata = read_header(path).get("__metadata__", {})
    if "model" not in metadata:
        raise WeightsError(
            f"{source}: its header names no model; name it: create_model(NAME, checkpoint={str(source)!r})."
        )
    try:
        model, config = metadata["model"], json.loads(metadata.get("config", "{}"))
        built = get_config(model).override(**config)
        _check_size(built)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: its header does not describe a model of zoo's: {reason(error)}.") from error
    tagged = next((entry for entry in list_weights(model) if entry.tag == metadata.get("tag")), None)
    own = Preprocessing(img_size=built.input_hw) if isinstance(built, ImageConfig) else Preprocessing()
    return Weights(
        preprocessing=own if tagged is None else tagged.preprocessing,
        labels=_standard_labels(config.get("num_classes", 1000)) if tagged is None else tagged.labels,
        family=family_name(model),
        model=model,
        tag=metadata.get("tag", ""),
        folder=path.parent,
        file=path.name,
        licence=metadata.get("licence", "unknown"),
        tokenizer=metadata.get("tokenizer", "" if tagged is None else tagged.tokenizer),
        layout="zoo",
        config=config,
    )


def _standard_labels(classes: int) -> tuple[str, ...] | str:
    """The names of so many classes, when nothing else names them: ImageNet's, or their numbers."""
    sizes = dict(zip((1000, 11821), LABEL_SETS, strict=True))
    return sizes.get(classes, tuple(map(str, range(classes))))


def _check_size(config: ModelConfig) -> None:
    """Refuse a config from elsewhere that asks for a network nobody has."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        axis: Axis | None = spec.metadata.get("axis")
        limit = _MAX_DEPTH if axis is not None and axis.dimension == "depth" else _MAX_NUMBER
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, int) and abs(entry) > limit:
                raise ConfigError(f"{spec.name} is {entry}; expected at most {limit}")


def overrides_of(config: ModelConfig, model: str) -> dict[str, Any]:
    """The fields in which a config differs from that of a variant of its family."""
    own = get_config(model).to_dict()
    return {name: value for name, value in config.to_dict().items() if value != own[name]}
