"""Are these the weights they are said to be? The hash, every key and shape, every value, and a forward pass."""

from typing import Any

import torch
from torch import Tensor

from zoo.errors import WeightsError
from zoo.factory import build, create_model
from zoo.pretrained.convert import convert_state_dict
from zoo.pretrained.fetch import fetch
from zoo.pretrained.files import forget_verified
from zoo.pretrained.load import load_state_dict
from zoo.pretrained.manifest import Weights
from zoo.pretrained.packed import is_packed

_TOLERANCE = 2e-5  # of max(1, the standard deviation of the logits)


def verify(weights: Weights) -> list[str]:
    """Check a set of weights; fetched if it is not here.

    Returns:
        What was checked, in words.

    Raises:
        WeightsError: If one of the checks fails, with the reason.
    """
    forget_verified()  # every hash is computed anew
    path = fetch(weights)  # which checks the hash
    if is_packed(path):  # into a model of its kind, whose loader checks all of it
        model = create_model(weights.model, checkpoint=path, **weights.config)
        return [f"{len(model.state_dict())} keys and shapes", "finite values", "ternary codes"]
    state = load_state_dict(path)  # which checks the structure of the file and the values
    state = convert_state_dict(state, weights.model, **weights.config)
    checked = [f"{len(state)} keys and shapes", "finite values"]
    if weights.sha256 and not weights.pickled:  # that of a pickle is not the conversion's
        checked.insert(0, "sha256")
    if weights.check:
        logits = first_logits(weights, state, len(weights.check))
        expected = torch.tensor(weights.check)
        difference = (logits - expected).abs().max().item()
        if difference > _TOLERANCE * max(1.0, expected.std().item()):
            raise WeightsError(f"{weights.name}: its outputs differ from those recorded by {difference:.2g}.")
        checked.append("outputs")
    return checked


@torch.inference_mode()
def first_logits(weights: Weights, state: dict[str, Tensor], count: int) -> Tensor:
    """The first logits for a picture that rises from -2 to 2: what a manifest's ``check`` records.

    Args:
        weights: Names the model.
        state: Its tensors, under zoo's names.
        count: How many logits.

    Returns:
        ``[count]`` float32.
    """
    config = weights.model_config
    model: Any = build(config).eval()
    model.load_state_dict(state)
    shape = (1, model.in_chans, *weights.preprocessing.img_size)
    picture = torch.linspace(-2.0, 2.0, torch.Size(shape).numel()).reshape(shape)
    return model(picture)[0, :count]
