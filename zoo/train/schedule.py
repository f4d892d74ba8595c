"""The learning rate as a closed form of the time, so that a resumed run needs to remember nothing of it."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.train.recipe import Schedule


def learning_rate(schedule: "Schedule", peak: float, epoch: float) -> float:
    """The rate of the step that begins when ``epoch`` epochs are done.

    After a linear warm-up from ``warmup_lr`` to ``peak``:

    - ``cosine``: half a cosine from ``peak`` to ``min_lr``, whose time counts from the start of training, as timm's;
      with ``warmup_prefix``, from the end of the warm-up.
    - ``linear``: a straight line from ``peak``, at the end of the warm-up, to ``min_lr``.
    - ``constant``: ``peak``.
    - ``wsd``, warm-up-stable-decay (arXiv:2404.06395): ``peak``, then a straight line to ``min_lr`` over the last
      ``decay_epochs``.
    - ``step``: ``peak`` times ``decay_rate`` for every ``decay_epochs`` since training began, at least ``min_lr``.

    The last ``cooldown_epochs`` are at ``min_lr``, and the rest is as if they were not there.

    Args:
        schedule: The recipe's section.
        peak: The rate at the end of the warm-up.
        epoch: Epochs done, from 0 to ``schedule.epochs``.
    """
    warmup, end, floor = schedule.warmup_epochs, schedule.epochs - schedule.cooldown_epochs, schedule.min_lr
    if epoch < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * epoch / warmup
    if epoch >= end and schedule.cooldown_epochs:
        return floor
    if schedule.warmup_prefix:
        return _decayed(schedule, peak, epoch - warmup, end - warmup, 0.0)
    return _decayed(schedule, peak, epoch, end, warmup)


def _decayed(schedule: "Schedule", peak: float, epoch: float, end: float, warmup: float) -> float:
    """The rate after the warm-up, in a training that ends after ``end`` epochs."""
    floor = schedule.min_lr
    if schedule.name == "cosine":
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * epoch / end))
    if schedule.name == "linear":
        return peak + (floor - peak) * (epoch - warmup) / (end - warmup)
    if schedule.name == "wsd":
        left = min((end - epoch) / schedule.decay_epochs, 1.0)
        return floor + (peak - floor) * left
    if schedule.name == "step":
        return max(peak * schedule.decay_rate ** int(epoch / schedule.decay_epochs), floor)
    return peak


def img_size_at(schedule: "Schedule", final: tuple[int, int], epoch: int) -> tuple[int, int]:
    """Height and width of training pictures in an epoch, in pixels, when they grow while training (arXiv:2104.00298).

    They grow from ``start_size`` by whole multiples of 32, evenly over the first ``grow_epochs``; 0 epochs: never.
    """
    if epoch >= schedule.grow_epochs:
        return final
    share = epoch / schedule.grow_epochs
    height, width = (32 * round((schedule.start_size + (side - schedule.start_size) * share) / 32) for side in final)
    return max(height, 32), max(width, 32)
