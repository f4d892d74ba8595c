"""What a model is judged by: sums over batches, then figures."""

import dataclasses
import inspect
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from zoo.data.image import Normalise
from zoo.data.loader import Batch, Loader
from zoo.data.tokens import IGNORED
from zoo.preprocessing import Preprocessing


class Scoring(Protocol):
    """How batches reach a model, and what its answers are worth.

    Attributes:
        best: The figure by which an epoch is the best.
        higher_is_better: Of that figure.
        num_sums: How many :meth:`score` returns.
    """

    best: str
    higher_is_better: bool
    num_sums: int

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on the device, ready for the model."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over a batch, float32 or float64; sums of several batches add up."""
        ...

    def figures(self, sums: list[float]) -> dict[str, float]:
        """What the sums of all batches come to."""
        ...

    def headline(self, figures: dict[str, float]) -> str:
        """The one that counts, for people."""
        ...


class ImageScoring:
    """Mean cross-entropy (nats), top-1 and top-5 accuracy (percent)."""

    best, higher_is_better, num_sums = "top1", True, 4

    def __init__(self, preprocessing: Preprocessing, *, channels_last: bool) -> None:
        self.normalise = Normalise(preprocessing, reuse=True)  # a batch is done with when the next one comes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        batch = batch.to(device)
        inputs = self.normalise(batch.inputs, batch.patches).contiguous(memory_format=self.layout)
        return dataclasses.replace(batch, inputs=inputs, patches=())

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.inputs).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        return torch.stack([loss, ranked[:, 0].sum(), ranked.any(1).sum(), loss.new_tensor(len(batch.targets))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        loss, top1, top5, count = sums
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}

    def headline(self, figures: dict[str, float]) -> str:
        return f"top-1 {figures['top1']:.2f} %"


class TextScoring:
    """Mean cross-entropy of a token (nats), and what its exponential is."""

    best, higher_is_better, num_sums = "loss", False, 2

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        batch = batch.to(device)
        positions = None if batch.positions is None else batch.positions.long()
        inputs, targets = batch.inputs.long(), batch.targets.long()
        return dataclasses.replace(batch, inputs=inputs, targets=targets, positions=positions)

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = next_token_logits(model, batch).flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return torch.stack([loss, (batch.targets != IGNORED).sum()])

    def figures(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / sums[1]
        return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp())}

    def headline(self, figures: dict[str, float]) -> str:
        return f"loss {figures['loss']:.4f}"


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits ``[B, T, vocab_size]`` of a model that returns them, or an object with ``logits``."""
    return next_token_answer(model, batch)[0]


def next_token_answer(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """:func:`next_token_logits`, and what the model wants added to the loss in training, a scalar, or None.

    ``position_ids``, which tell where a document begins, go to every model that takes them.
    """
    plain = getattr(model, "module", model)  # in a distributed wrapper
    options = {"position_ids": batch.positions} if _takes(plain, "position_ids") else {}
    answer = model(batch.inputs, **options)
    return (answer, None) if isinstance(answer, Tensor) else (answer.logits, getattr(answer, "router_loss", None))


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, scoring: Scoring, accelerator: Accelerator) -> dict[str, float]:
    """The figures of a model over all processes' batches."""
    was_training = model.training
    model.eval()
    double = torch.float32 if accelerator.device.type == "mps" else torch.float64  # which MPS has not
    totals = torch.zeros(scoring.num_sums, dtype=double, device=accelerator.device)
    for batch in loader:
        batch = scoring.prepare(batch, accelerator.device)
        with accelerator.autocast():
            totals += scoring.score(model, batch)
    model.train(was_training)
    return scoring.figures(accelerator.reduce(totals).tolist())  # type: ignore[union-attr]
