"""What is shipped: a model with trained weights, or random ones where those are asked for; preprocessing and labels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import ImageConfig, ModelConfig
from zoo.data.image import EvalTransform, Normalise, read_image
from zoo.data.sources import IMAGE_SUFFIXES
from zoo.errors import DataError, WeightsError
from zoo.factory import create_model
from zoo.inference import class_names, load_run
from zoo.preprocessing import Preprocessing
from zoo.pretrained.manifest import list_weights
from zoo.pretrained.source import find_weights, is_source
from zoo.registry import get_config, split_name

_CALIBRATION = 256  # pictures; more change nothing in what is calibrated with them


@dataclass(frozen=True)
class Shipped:
    """A model in eval mode with what belongs to it."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    random: bool  # whether its weights are
    multi_label: bool = False  # whether a picture may be of several classes

    @property
    def in_chans(self) -> int:
        """Channels of its input."""
        config: Any = self.model.config
        return int(config.in_chans)


def load_for_shipping(name: str, *, img_size: int | None = None, random_weights: bool = False) -> Shipped:
    """A model with trained weights, by name or place, or with random ones.

    Args:
        name: As :func:`zoo.inference.load_classifier` takes it.
        img_size: Side in pixels to build it for; its own by default.
        random_weights: Do not look for weights.

    Raises:
        WeightsError: If there are no weights and random ones were not asked for, or the model does not take pictures.
    """
    if random_weights:
        _check_pictures(name, get_config(name))
        model: Any = create_model(name, pretrained=False, img_size=img_size).eval()
        preprocessing = Preprocessing(img_size=model.config.input_hw)
        return Shipped(name, model, preprocessing, tuple(map(str, range(model.num_classes))), True)
    if Path(name).is_dir():
        found = load_run(name)
        model, preprocessing, labels, several = found.model, found.preprocessing, found.labels, found.multi_label
        if img_size is not None:
            model.set_input_size(img_size)
    else:
        if not is_source(name) and not list_weights(split_name(name)[0]):
            _check_pictures(name, get_config(name))
            raise WeightsError(
                f"{name} has no published weights, and a file with random ones is of no use; ask for them, with "
                f"--random-weights, to try things out."
            )
        weights = find_weights(name)
        _check_pictures(name, weights.model_config)
        model = create_model(name, pretrained=True, img_size=img_size).eval()
        preprocessing, labels, several = weights.preprocessing, class_names(weights.labels), weights.multi_label
    if img_size is not None:
        preprocessing = replace(preprocessing, img_size=(img_size, img_size))
    return Shipped(name, model, preprocessing, labels, False, several)


def _check_pictures(name: str, config: ModelConfig) -> None:
    """Raise for a model that does not take pictures, before anything is downloaded."""
    if not isinstance(config, ImageConfig):
        raise WeightsError(f"{name} reads text; expected an image model: zoo.optimize(model) takes language models.")


def read_pictures(folder: Path, preprocessing: Preprocessing, limit: int = _CALIBRATION) -> Tensor:
    """Pictures of a folder and the folders in it, evenly drawn, as the model takes them: ``[N, C, H, W]`` float32.

    Raises:
        DataError: If there are none, or one cannot be read.
    """
    files = (
        sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    )
    if not files:
        raise DataError(f"{folder} has no pictures; expected a folder of {', '.join(sorted(IMAGE_SUFFIXES))} files.")
    step = max(1, len(files) // limit)
    transform = EvalTransform(preprocessing)
    images = torch.stack([transform(read_image(file)) for file in files[::step][:limit]])
    return Normalise(preprocessing)(images)
