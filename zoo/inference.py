"""From a name or a run folder to a model that can be fed pictures, with its preprocessing and class names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from zoo.data.image import eval_transform, read_image
from zoo.errors import WeightsError
from zoo.factory import build, create_model
from zoo.preprocessing import Preprocessing
from zoo.pretrained.load import fit_state_dict, load_state_dict
from zoo.pretrained.manifest import get_weights
from zoo.registry import family_of
from zoo.train.run_folder import ModelRecord, RunFolder


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        model: In eval mode.
        preprocessing: What its input goes through.
        labels: Class names in the order of the logits.
    """

    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    @torch.inference_mode()
    def predict(self, pictures: Sequence[str | Path | Image.Image], *, top: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each picture, as ``(label, probability)``, likeliest first.

        Raises:
            DataError: If a picture cannot be read.
        """
        transform = eval_transform(self.preprocessing)
        images = [picture if isinstance(picture, Image.Image) else read_image(picture) for picture in pictures]
        device = next(self.model.parameters()).device
        batch = torch.stack([transform(image) for image in images]).to(device)
        probabilities = self.model(batch).float().softmax(dim=-1).cpu()
        values, indices = probabilities.topk(min(top, probabilities.shape[1]))
        return [
            [(self.labels[index], value) for value, index in zip(row_values, row_indices, strict=True)]
            for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True)
        ]


def load_classifier(model: str | Path, *, device: str | torch.device | None = None) -> Classifier:
    """A classifier from a model's name (its default weights, or ``name.tag``) or from a run folder.

    Raises:
        UnknownModelError, WeightsError: If there is no such model, folder, or file.
    """
    if Path(model).is_dir():
        return load_run(model, device=device)
    weights = get_weights(str(model))
    network = create_model(weights.name, pretrained=True, device=device).eval()
    return Classifier(network, weights.preprocessing, class_names(weights.labels))


def load_run(
    path: str | Path, *, weights: str | Path | None = None, device: str | torch.device | None = None
) -> Classifier:
    """The classifier that a run folder holds, or the same with the weights of another file.

    Raises:
        WeightsError: If it is not a run folder, or its run has not finished an epoch.
    """
    folder = RunFolder(Path(path))
    record = ModelRecord.read(folder)
    if weights is None and not folder.weights.is_file():
        raise WeightsError(f"{folder.path} has no {folder.weights.name}: the run has not finished its first epoch.")
    network: Any = build(record.config, device=device)
    fit_state_dict(network, load_state_dict(weights or folder.weights), family_of(record.config))
    return Classifier(network.eval(), record.preprocessing, record.labels)


def class_names(labels: tuple[str, ...] | str) -> tuple[str, ...]:
    """Class names in the order of the logits; the name ``"imagenet-1k"`` stands for its 1,000 descriptions."""
    if labels != "imagenet-1k":
        return tuple(labels)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(i, detailed=False) for i in range(info.num_classes()))
