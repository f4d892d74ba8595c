"""From a name or a run folder to a model that can be fed pictures, with its preprocessing and class names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from zoo.data.image import EvalTransform, Normalise, as_rgb, read_image
from zoo.errors import WeightsError
from zoo.factory import build, check_device, create_model
from zoo.preprocessing import Preprocessing
from zoo.pretrained.load import fit_state_dict, load_state_dict
from zoo.pretrained.source import find_weights, is_source
from zoo.registry import family_of
from zoo.train.run_folder import ModelRecord, RunFolder

_BATCH = 64  # pictures that go through the model together


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        model: In eval mode.
        preprocessing: What its input goes through.
        labels: Class names in the order of the logits.
        multi_label: Whether a picture may be of several classes: each has a probability of its own.
    """

    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    multi_label: bool = False

    @torch.inference_mode()
    def predict(self, pictures: Sequence[str | Path | Image.Image], *, top: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each picture, as ``(label, probability)``, likeliest first.

        Of several labels, each has a probability of its own; those of at least one half are the answer.

        Args:
            pictures: Files, or pictures of any mode.
            top: How many classes; all of them if there are fewer.

        Raises:
            DataError: If a picture cannot be read.
        """
        transform, normalise = EvalTransform(self.preprocessing), Normalise(self.preprocessing)
        example = next(self.model.parameters())
        answers: list[list[tuple[str, float]]] = []
        for start in range(0, len(pictures), _BATCH):
            images = [transform(_open(picture)) for picture in pictures[start : start + _BATCH]]
            inputs = normalise(torch.stack(images).to(example.device))
            logits = self.model(inputs.to(example.dtype))
            probabilities = logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=-1)
            ranked = probabilities.cpu().topk(min(top, logits.shape[1]))
            for values, indices in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True):
                answers.append([(self.labels[i], value) for i, value in zip(indices, values, strict=True)])
        return answers


def _open(picture: str | Path | Image.Image) -> Image.Image:
    return as_rgb(picture) if isinstance(picture, Image.Image) else read_image(picture)


def load_classifier(model: str | Path, *, device: str | torch.device | None = None) -> Classifier:
    """A classifier from a model's name (its default weights, or ``name.tag``), from a run folder, or from anywhere.

    Anywhere is what :func:`zoo.create_model` takes for a name, such as ``"hf-hub:owner/name"``.

    Raises:
        UnknownModelError, WeightsError: If there is no such model, folder, or file.
        ConfigError: If the device cannot be used.
    """
    check_device(device)
    if Path(model).is_dir():
        return load_run(model, device=device)
    if not is_source(model) and (not isinstance(model, str) or len(Path(model).parts) > 1):
        raise WeightsError(f"No run folder {str(model)!r}; expected one, or the name of a model (`zoo list`).")
    weights = find_weights(model)
    network = create_model(str(model), pretrained=True, device=device).eval()
    return Classifier(network, weights.preprocessing, class_names(weights.labels), weights.multi_label)


def load_run(
    path: str | Path, *, weights: str | Path | None = None, device: str | torch.device | None = None
) -> Classifier:
    """The classifier that a run folder holds, or the same with the weights of another file.

    Raises:
        WeightsError: If it is not a run folder, its run has not finished an epoch, or it is no classifier's.
    """
    return as_classifier(*load_model(path, weights=weights, device=device), path)


def load_model(
    path: str | Path, *, weights: str | Path | None = None, device: str | torch.device | None = None
) -> tuple[nn.Module, ModelRecord]:
    """The model that a run folder holds, in eval mode, and what belongs to it. Arguments and errors as above."""
    folder = RunFolder(Path(path))
    record = ModelRecord.read(folder)
    if weights is None and not folder.weights.is_file():
        raise WeightsError(f"{folder.path} has no {folder.weights.name}: the run has not finished its first epoch.")
    network: Any = build(record.config, device=device)
    fit_state_dict(network, load_state_dict(weights or folder.weights), family_of(record.config))
    return network.eval(), record


def as_classifier(model: nn.Module, record: ModelRecord, path: str | Path) -> Classifier:
    """A model with its record as a classifier.

    Raises:
        WeightsError: If it is no classifier; ``path`` says whose.
    """
    if record.preprocessing is None:
        raise WeightsError(f"{path} holds {record.name}, which reads text; expected a classifier of pictures.")
    return Classifier(model, record.preprocessing, record.labels, record.multi_label)


def class_names(labels: tuple[str, ...] | str) -> tuple[str, ...]:
    """Class names in the order of the logits; a string, as ``"imagenet-1k"``, is a set that timm knows."""
    if not isinstance(labels, str):
        return labels
    from timm.data import ImageNetInfo

    info = ImageNetInfo(labels)
    return tuple(info.index_to_description(i, detailed=False) for i in range(info.num_classes()))
