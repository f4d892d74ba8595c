"""Samplers that leave samples out of an epoch, by chance or by what is known of their losses.

A pruning method is a class with :meth:`Pruning.select`; the loop reports every sample's loss to it, and multiplies
losses by the weights that it gives.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


class Pruning(ABC):
    """Decides before every epoch which samples it has.

    Attributes:
        losses: ``[N]`` float32, the last loss of every sample as of the beginning of the epoch; NaN where unknown.
        weights: ``[N]`` float32, what a sample's loss is multiplied by in this epoch.
    """

    def __init__(self, size: int, *, fraction: float, epochs: int, seed: int) -> None:
        self.size, self.fraction, self.epochs, self.seed = size, fraction, epochs, seed
        self.losses = np.full(size, np.nan, np.float32)
        self.weights = np.ones(size, np.float32)
        self._pending = np.full(size, np.nan, np.float32)  # losses seen in this epoch, by this process

    @abstractmethod
    def select(self, epoch: int) -> np.ndarray:
        """Positions of the samples of an epoch, a function of (seed, epoch, losses); sets :attr:`weights`."""

    def update(self, indices: Tensor, losses: Tensor) -> None:
        """Report losses of samples, ``[B]`` each."""
        self._pending[indices.cpu().numpy()] = losses.float().cpu().numpy()

    def weights_of(self, indices: Tensor) -> Tensor:
        """The weights of samples, ``[B]``, on the device of ``indices``."""
        return torch.from_numpy(self.weights[indices.cpu().numpy()]).to(indices.device)

    def gather(self, accelerator: Accelerator) -> None:
        """Exchange the losses that the processes have seen in this epoch."""
        if accelerator.num_processes == 1:
            return
        pending = torch.from_numpy(self._pending).to(accelerator.device)
        seen = ~pending.isnan()
        total = accelerator.reduce(torch.stack([pending.nan_to_num(), seen.float()]))
        self._pending = (total[0] / total[1]).cpu().numpy()  # 0 / 0 is NaN again

    def end_epoch(self, accelerator: Accelerator) -> None:
        """Take the losses of the epoch for known."""
        self.gather(accelerator)
        self.losses = np.where(np.isnan(self._pending), self.losses, self._pending)
        self._pending = np.full(self.size, np.nan, np.float32)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs; call :meth:`gather` before."""
        return {"losses": torch.from_numpy(self.losses), "pending": torch.from_numpy(self._pending)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.losses, self._pending = state["losses"].numpy().copy(), state["pending"].numpy().copy()

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, 0xC07])


class RandomPruning(Pruning):
    """Leaves out a random share, another in every epoch."""

    def select(self, epoch: int) -> np.ndarray:
        kept = max(round((1 - self.fraction) * self.size), 1)
        return np.sort(self._generator(epoch).permutation(self.size)[:kept])


class LossPruning(Pruning):
    """Leaves out a random share of the samples whose loss is below the mean, and weighs the rest of those up.

    The expected gradient stays that of all samples. The first epoch, the last eighth, and samples whose loss is unknown
    are never pruned. InfoBatch, arXiv:2303.04947.
    """

    def select(self, epoch: int) -> np.ndarray:
        self.weights = np.ones(self.size, np.float32)
        if epoch >= 0.875 * self.epochs or np.isnan(self.losses).all():
            return np.arange(self.size)
        low = self.losses < np.nanmean(self.losses)  # false where unknown
        self.weights[low] = 1 / (1 - self.fraction)
        return np.flatnonzero(~low | (self._generator(epoch).random(self.size) >= self.fraction))


PRUNING: dict[str, type[Pruning]] = {"random": RandomPruning, "loss": LossPruning}
