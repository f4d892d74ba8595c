"""What a model is judged by: sums over batches, then figures."""

import dataclasses
import inspect
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
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
    """

    best: str
    higher_is_better: bool

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on the device, ready for the model."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        """What :meth:`figures` needs of a batch."""
        ...

    def figures(self, scores: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
        """What the scores of all batches of all processes come to; ``scores`` are those of this one."""
        ...

    def headline(self, figures: dict[str, float]) -> str:
        """The one that counts, for people."""
        ...


def _total(scores: list[Tensor], count: int, accelerator: Accelerator) -> list[float]:
    """``count`` sums over a batch each, added up over all batches of all processes."""
    double = torch.float32 if accelerator.device.type == "mps" else torch.float64  # which MPS has not
    totals = torch.zeros(count, dtype=double, device=accelerator.device)
    for sums in scores:
        totals += sums
    return accelerator.reduce(totals).tolist()  # type: ignore[union-attr]


class _Pictures:
    """What scorings of pictures have in common."""

    def __init__(self, preprocessing: Preprocessing, *, channels_last: bool) -> None:
        self.normalise = Normalise(preprocessing, reuse=True)  # a batch is done with when the next one comes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        batch = batch.to(device)
        inputs = self.normalise(batch.inputs, batch.patches).contiguous(memory_format=self.layout)
        return dataclasses.replace(batch, inputs=inputs, patches=())


class ImageScoring(_Pictures):
    """Mean cross-entropy (nats), top-1 and top-5 accuracy (percent)."""

    best, higher_is_better = "top1", True

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.inputs).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        return torch.stack([loss, ranked[:, 0].sum(), ranked.any(1).sum(), loss.new_tensor(len(batch.targets))])

    def figures(self, scores: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
        loss, top1, top5, count = _total(scores, 4, accelerator)
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}

    def headline(self, figures: dict[str, float]) -> str:
        return f"top-1 {figures['top1']:.2f} %"


class MultiLabelScoring(_Pictures):
    """Of pictures with several labels: mean binary cross-entropy (nats), ``map`` and ``f1`` (percent).

    ``map`` is the mean over classes of :func:`average_precision`, of those that have a picture; ``f1`` is that of all
    answers together, a class being found where its probability is at least one half.
    """

    best, higher_is_better = "map", True

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack([model(batch.inputs).float(), batch.targets.float()]).cpu()

    def figures(self, scores: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
        logits, targets = torch.cat(gather_object(scores), 1)  # every process's share may be of another size
        precisions = average_precision(logits, targets > 0)
        return {
            "loss": float(F.binary_cross_entropy_with_logits(logits.double(), targets.double())),
            "map": 100 * float(precisions.nanmean()),
            "f1": 100 * float(f1_score(logits >= 0, targets > 0)),
        }

    def headline(self, figures: dict[str, float]) -> str:
        return f"mAP {figures['map']:.2f} %"


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Of every class, the mean of the precision at each of its pictures, ranked by score; equal scores rank together.

    Args:
        scores: ``[N, C]``, of any scale.
        truth: ``[N, C]`` bool.

    Returns:
        ``[C]`` float64 from 0 to 1; NaN for a class without a picture.
    """
    ranked, order = scores.sort(0, descending=True)
    found = truth.gather(0, order).double().cumsum(0)
    precision = found / torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    # Where scores are equal, what counts is the precision after the last of them.
    last = torch.ones_like(truth)
    last[:-1] = ranked[:-1] != ranked[1:]
    answers = []
    for each in range(scores.shape[1]):
        at = last[:, each]
        hits = found[at, each].diff(prepend=found.new_zeros(1))
        answers.append((precision[at, each] * hits).sum() / found[-1, each])
    return torch.stack(answers)


def f1_score(answers: Tensor, truth: Tensor, dim: int | None = None) -> Tensor:
    """2 TP / (2 TP + FP + FN) of bool answers, float64: over all of them, or along a dimension; 0 where it is 0 / 0."""
    both, either = (answers & truth).double(), answers.double() + truth.double()
    both, either = (each.sum() if dim is None else each.sum(dim) for each in (both, either))
    return 2 * both / either.clamp(min=1)


def image_scoring(preprocessing: Preprocessing, *, channels_last: bool, multi_label: bool) -> Scoring:
    """How pictures are scored, of which each has one label or several."""
    return (MultiLabelScoring if multi_label else ImageScoring)(preprocessing, channels_last=channels_last)


class TextScoring:
    """Mean cross-entropy of a token (nats), and what its exponential is."""

    best, higher_is_better = "loss", False

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        batch = batch.to(device)
        positions = None if batch.positions is None else batch.positions.long()
        inputs, targets = batch.inputs.long(), batch.targets.long()
        return dataclasses.replace(batch, inputs=inputs, targets=targets, positions=positions)

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = next_token_logits(model, batch).flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return torch.stack([loss, (batch.targets != IGNORED).sum()])

    def figures(self, scores: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
        total, count = _total(scores, 2, accelerator)
        loss = total / count
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
    """The figures of a model over all processes' batches, of which each process has one or more."""
    was_training = model.training
    model.eval()
    scores = []
    for batch in loader:
        batch = scoring.prepare(batch, accelerator.device)
        with accelerator.autocast():
            scores.append(scoring.score(model, batch))
    # A model that is shared out is run by all processes at once, also by those that have fewer batches.
    for _ in range(len(loader) - len(scores)):
        with accelerator.autocast():
            scoring.score(model, batch)
    model.train(was_training)
    return scoring.figures(scores, accelerator)
