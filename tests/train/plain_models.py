"""Models in which the samples of a batch do not see each other: for comparing one process with several."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zoo
from zoo.config import ImageConfig, ModelConfig
from zoo.models._backbone import Backbone


class Plain(Backbone):
    """No batch norm."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.in_chans, 8, 8, stride=8)
        self.stages = nn.Sequential(nn.GELU())
        self.finish(config, widths=(8,), reductions=(8,))

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)


@dataclass(frozen=True, kw_only=True)
class PlainTextConfig(ModelConfig):
    vocab_size: int = 257
    hidden_size: int = 24


class PlainText(nn.Module):
    """A recurrent network that is told the positions, and needs them for nothing."""

    def __init__(self, config: PlainTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert position_ids.shape == input_ids.shape
        return self.lm_head(self.mix(self.embed_tokens(input_ids))[0])


_ABOUT = {"title": "", "paper": "", "code": "none", "licence": "Apache-2.0"}
IMAGES = zoo.Family("plain_images", config=ImageConfig, model=Plain, **_ABOUT)
TEXT = zoo.Family("plain_text", config=PlainTextConfig, model=PlainText, **_ABOUT)


@IMAGES.variant
def plain_images() -> ImageConfig:
    return ImageConfig(img_size=32)


@TEXT.variant
def plain_text() -> PlainTextConfig:
    return PlainTextConfig()
