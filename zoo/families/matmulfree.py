"""MatMul-free LM in numbers. The network is :mod:`zoo.models.matmulfree`."""

import math
from dataclasses import dataclass
from typing import Any

from zoo.config import TextConfig
from zoo.registry import Family


@dataclass(frozen=True, kw_only=True)
class MatMulFreeConfig(TextConfig):
    """The released models' ``config.json``."""

    intermediate_size: int | None = None  # width of the MLP; None: 8/3 of hidden_size, up to a multiple of 256

    @property
    def mlp_width(self) -> int:
        """Width of the MLP, the default worked out."""
        return self.intermediate_size or 256 * math.ceil(int(8 * self.hidden_size / 3) / 256)

    def validate(self) -> None:
        super().validate()
        if self.intermediate_size is not None:
            self.check_positive("intermediate_size")

    def fit(self, changes: dict[str, Any]) -> dict[str, Any]:
        """An MLP whose width is given grows with the others."""
        if self.intermediate_size is not None:
            wider = changes.get("hidden_size", self.hidden_size) / self.hidden_size
            changes = changes | {"intermediate_size": max(64, round(self.intermediate_size * wider / 64) * 64)}
        return super().fit(changes)


FAMILY = Family(
    "matmulfree",
    config=MatMulFreeConfig,
    model="zoo.models.matmulfree:LM",
    title="MatMul-free LM",
    paper="arXiv:2406.02528",
    code="github.com/ridgerchu/matmulfreellm @ a016f72, mmfreelm",
    licence="Apache-2.0",
    task="text-generation",
)


@FAMILY.variant
def matmulfree_2m() -> MatMulFreeConfig:
    """1.87 M parameters, on bytes: ours, to be trained on a laptop."""
    return MatMulFreeConfig(
        vocab_size=257,
        hidden_size=192,
        num_hidden_layers=4,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=256,
    )


@FAMILY.variant
def matmulfree_14m() -> MatMulFreeConfig:
    """14.4 M parameters, on bytes: ours."""
    return MatMulFreeConfig(
        vocab_size=257,
        hidden_size=384,
        num_hidden_layers=8,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=256,
    )


@FAMILY.variant
def matmulfree_370m() -> MatMulFreeConfig:
    """374 M parameters, trained on 15 B tokens; ridger/MMfreeLM-370M."""
    return MatMulFreeConfig(hidden_size=1024, num_hidden_layers=24)


@FAMILY.variant
def matmulfree_1_3b() -> MatMulFreeConfig:
    """1.36 B parameters, trained on 100 B tokens; ridger/MMfreeLM-1.3B."""
    return MatMulFreeConfig(hidden_size=2048, num_hidden_layers=24)


@FAMILY.variant
def matmulfree_2_7b() -> MatMulFreeConfig:
    """2.70 B parameters, trained on 100 B tokens; ridger/MMfreeLM-2.7B."""
    return MatMulFreeConfig(hidden_size=2560, num_hidden_layers=32)
