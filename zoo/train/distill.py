"""Learning from a teacher: from its probabilities, its answers or its features."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.loader import Batch
from zoo.errors import RecipeError, nearest, reason
from zoo.inference import Classifier, class_names, load_classifier
from zoo.preprocessing import Preprocessing
from zoo.train.recipe import Distill, Recipe

_TIMM = "timm:"


class Teacher:
    """A frozen model whose answers a student learns besides the labels.

    - ``soft``: the divergence between both models' probabilities at a temperature (arXiv:1503.02531).
    - ``hard``: cross-entropy with the teacher's best answer (arXiv:2012.12877). A student that returns two logits while
      training learns the labels with the first and the teacher with the second.
    - ``feature``: the samples of a batch are to resemble each other for the student as they do for the teacher, in the
      pooled features before the classifier (arXiv:1907.09682); their widths may differ.

    Args:
        distill: Which teacher, and how.
        student: The model that learns.
        classes: Names of the classes that it learns.
        preprocessing: What pictures have gone through when they reach the student; a teacher that was trained with
            other means and deviations gets them renormalised.

    Raises:
        RecipeError: If the two do not fit.
        UnknownModelError, WeightsError: If there is no such teacher.
    """

    def __init__(self, distill: Distill, student: Any, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
        self.distill = distill
        teacher = load_teacher(distill.teacher)
        if distill.kind != "feature":
            _check_classes(teacher.labels, classes, distill.teacher)
        self.model = teacher.model.requires_grad_(False)
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        own = teacher.preprocessing
        own_mean, own_std = (torch.tensor(values)[:, None, None] for values in (own.mean, own.std))
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std
        self._features: dict[bool, Tensor] = {}  # of the student (False) and of the teacher (True)
        if distill.kind == "feature":
            both: tuple[tuple[bool, Any], ...] = ((False, student), (True, self.model))
            for which, each in both:
                classifier = each.get_classifier()
                first = classifier[0] if isinstance(classifier, tuple) else classifier  # of two, which see the same
                first.register_forward_pre_hook(self._keep(which))

    def _keep(self, which: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._features[which] = inputs[0]

        return hook

    def losses(self, student: nn.Module, batch: Batch, labels_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The loss of each sample, ``[B]``; ``labels_loss`` is that of logits beside the labels."""
        distill = self.distill
        if self._scale.device != batch.inputs.device:
            self.model.to(batch.inputs.device)
            self._scale, self._shift = self._scale.to(batch.inputs.device), self._shift.to(batch.inputs.device)
        answer = student(batch.inputs)
        logits, learned = answer if isinstance(answer, tuple) else (answer, answer)
        labels = labels_loss(logits, batch.targets)
        with torch.no_grad():
            taught = self.model(batch.inputs * self._scale + self._shift).float()
        if distill.kind == "feature":
            return labels + distill.alpha * _similarity_losses(self._features.pop(False), self._features.pop(True))
        learned = learned.float()
        if distill.kind == "hard":
            teaching = F.cross_entropy(learned, taught.argmax(1), reduction="none")
        else:
            t = distill.temperature
            answers = F.log_softmax(learned / t, 1), F.log_softmax(taught / t, 1)
            teaching = t**2 * F.kl_div(*answers, reduction="none", log_target=True).sum(1)
        return (1 - distill.alpha) * labels + distill.alpha * teaching


def load_teacher(name: str) -> Classifier:
    """A classifier of the zoo, or, as ``timm:NAME``, one of timm's with its pretrained weights.

    Raises:
        RecipeError: If timm has no such model, or its weights cannot be fetched.
        UnknownModelError, WeightsError: If the zoo has no such model.
    """
    if not name.startswith(_TIMM):
        return load_classifier(name)
    import timm

    wanted = name.removeprefix(_TIMM)
    known = timm.list_pretrained()
    if wanted not in known and not timm.is_model(wanted):
        raise RecipeError(f"distill.teacher is {name!r}, which timm does not know.{nearest(wanted, known)}")
    try:
        model: Any = timm.create_model(wanted, pretrained=True).eval()
    except (OSError, RuntimeError) as error:  # RuntimeError: no weights
        raise RecipeError(f"distill.teacher is {name!r}, whose weights cannot be had: {reason(error)}.") from error
    cfg = model.pretrained_cfg
    labels = tuple(cfg.get("label_names") or ()) or class_names("imagenet-1k")
    if len(labels) != model.num_classes:
        labels = tuple(str(i) for i in range(model.num_classes))
    own = Preprocessing(img_size=cfg["input_size"][1:], mean=cfg["mean"], std=cfg["std"])
    return Classifier(model, own, labels)


def self_taught(logits: Tensor, average: nn.Module, inputs: Tensor, recipe: Recipe) -> Tensor:
    """How far answers are from those of the model's own averaged weights, ``[B]`` (MESA, arXiv:2205.14083)."""
    with torch.no_grad():
        taught = average(inputs).float()
    if recipe.loss.name == "bce":
        return F.binary_cross_entropy_with_logits(logits.float(), taught.sigmoid(), reduction="none").mean(1)
    t = recipe.distill.temperature
    answers = F.log_softmax(logits.float() / t, 1), F.log_softmax(taught / t, 1)
    return t**2 * F.kl_div(*answers, reduction="none", log_target=True).sum(1)


def _check_classes(known: tuple[str, ...], wanted: tuple[str, ...], teacher: str) -> None:
    if len(known) != len(wanted):
        raise RecipeError(
            f"distill.teacher {teacher} knows {len(known)} classes, the data has {len(wanted)}; expected a teacher of "
            "the same classes, or distill.kind='feature'."
        )
    if known != wanted and set(known) == set(wanted):
        raise RecipeError(f"distill.teacher {teacher} has the data's classes in another order; expected the same.")


def _similarity_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between each sample's similarities to the batch's samples, ``[B]``."""
    rows = [F.normalize(features.float() @ features.float().T, dim=1) for features in (student, teacher)]
    return (rows[0] - rows[1]).square().sum(1)
