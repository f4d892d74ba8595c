"""Publishing weights: a repository that zoo, and for pictures timm, loads again.

A repository is ``config.json``, ``model.safetensors`` under zoo's names, and a model card. For pictures the config is
in timm's layout, its architecture ``zoo_<model>`` as in :mod:`zoo.integrations.timm`; for text in transformers'.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zoo
from zoo.atomic import save_safetensors, write_atomically
from zoo.config import ImageConfig
from zoo.data.tokens import load_tokenizer
from zoo.errors import WeightsError
from zoo.factory import build, pretrained_cfg
from zoo.pretrained.convert import convert_state_dict
from zoo.pretrained.download import hub_reason
from zoo.pretrained.fetch import fetch
from zoo.pretrained.load import load_state_dict
from zoo.pretrained.manifest import Weights
from zoo.pretrained.source import CONFIG_FILE, MULTI_LABEL, TIMM_PREFIX, WEIGHTS_FILE, find_weights, overrides_of
from zoo.registry import Family, get_family

_SOURCE_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename")  # where the weights came from is not where they are now


def push(
    source: str | Path, repo: str, *, licence: str = "", private: bool = False, revision: str = "", message: str = ""
) -> str:
    """Publish weights on the Hub, in one commit; the repository is made if there is none.

    Args:
        source: What :func:`zoo.pretrained.source.find_weights` takes, for example ``"local-dir:runs/mine"``.
        repo: ``"owner/name"``.
        licence: SPDX identifier; by default that of the source.
        private: Whether a new repository is only for its owner.
        revision: Branch to commit to; the main one by default.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        UnknownModelError, WeightsError: If the source cannot be read, no licence is known, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    with TemporaryDirectory() as folder:
        weights = write_repository(source, Path(folder), licence=licence, repo=repo)
        api = HfApi(library_name="zoo", library_version=zoo.__version__)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision or None,
                commit_message=message or f"Weights of {weights.name}",
            )
        # RuntimeError: what the client makes of an upload that failed.
        except (OSError, HTTPError, HFValidationError, RuntimeError, ValueError) as error:
            raise WeightsError(f"Cannot push to the Hub repository {repo}: {hub_reason(error, repo)}.") from error
    return commit.commit_url


def write_repository(source: str | Path, folder: Path, *, licence: str = "", repo: str = "owner/name") -> Weights:
    """Write what :func:`push` uploads into a folder, which ``"local-dir:FOLDER"`` loads.

    Raises:
        UnknownModelError, WeightsError: If the source cannot be read, or no licence is known.
        OSError: If the folder cannot be written.
    """
    weights = find_weights(source)
    licence = licence or weights.licence
    if licence == "unknown":
        raise WeightsError(f"{source} does not say under which licence its weights are; name it: --licence apache-2.0.")
    state = convert_state_dict(load_state_dict(fetch(weights)), weights.model, **weights.config)
    family, config = get_family(weights.family), weights.model_config
    described = {"model": weights.model, "tag": weights.tag, "licence": licence, "zoo_version": zoo.__version__}
    if overrides := overrides_of(config, weights.model):
        described["config"] = json.dumps(overrides)
    if weights.tokenizer:
        described["tokenizer"] = weights.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(state, folder / WEIGHTS_FILE, described)
    model: Any = build(config, device="meta")
    if isinstance(config, ImageConfig):
        values = _timm_config(weights, config, model, licence)
    elif hasattr(model, "generate"):  # transformers' Auto classes load it, once zoo is imported
        values = {
            "architectures": [type(model).__name__],
            **json.loads(model.config.to_json_string()),
            "license": licence,
        }
        values |= {"tokenizer": weights.tokenizer} if weights.tokenizer else {}
        if weights.tokenizer:
            load_tokenizer(weights.tokenizer).to_transformers().save_pretrained(folder)
    else:
        values = {"model_type": family.name, "license": licence, **config.to_dict()}
    params = sum(parameter.numel() for parameter in model.parameters())
    texts = {
        CONFIG_FILE: json.dumps(values, indent=2) + "\n",
        "README.md": _card(weights, family, licence, repo, params),
    }
    for name, text in texts.items():
        with write_atomically(folder / name) as file:
            file.write(text.encode())
    return weights


def _timm_config(weights: Weights, config: ImageConfig, model: Any, licence: str) -> dict[str, Any]:
    cfg = pretrained_cfg(weights.model, weights, config, model.feature_info[-1]["reduction"])
    cfg = {key: value for key, value in cfg.items() if key not in _SOURCE_KEYS} | {"license": licence}
    del cfg["architecture"]
    labels = cfg.pop("label_names", None)
    arguments = {key: value for key, value in overrides_of(config, weights.model).items() if key != "num_classes"}
    return {
        "architecture": TIMM_PREFIX + weights.model,
        "num_classes": config.num_classes,
        "num_features": model.num_features,
        "global_pool": config.global_pool,
        **({"label_names": labels} if labels else {}),
        **({"problem_type": MULTI_LABEL} if weights.multi_label else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": cfg,
    }


def _card(weights: Weights, family: Family, licence: str, repo: str, params: int) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=family.task,
            dataset_type=metric.dataset,
            dataset_name=metric.dataset,
            metric_type="accuracy" if metric.top1 is not None else "loss",
            metric_value=metric.top1 if metric.top1 is not None else metric.loss,
        )
        for metric in weights.metrics[:1]
    ]
    front = ModelCardData(
        license=licence,
        library_name="zoo",
        pipeline_tag=family.task,
        tags=["zoo", family.name],
        model_name=weights.name,
        eval_results=results,
    )
    timm = f"""
or, with zoo installed, in timm:

```python
import timm, zoo.integrations.timm

zoo.integrations.timm.register()
model = timm.create_model("hf-hub:{repo}", pretrained=True)
```
"""
    figures = "".join(f"- {metric.dataset}: {metric.words} ({metric.source})\n" for metric in weights.metrics)
    return f"""---
{front.to_yaml()}
---

# {weights.name}

{family.title}, {params / 1e6:.2f} M parameters. Paper: {family.paper}. Original code: {family.code} ({family.licence}).

```python
import zoo

model = zoo.create_model("hf-hub:{repo}")
```
{timm if family.task == "image-classification" else ""}
{figures or "No accuracy is recorded."}
{weights.notes}
"""
