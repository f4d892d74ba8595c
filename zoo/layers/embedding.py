"""Embeddings that take a quarter of the memory."""

import torch
from torch import Tensor, nn


class Int8Embedding(nn.Module):
    """Token ids ``[...]`` to ``[..., D]``: an embedding for inference, at 8 bits a number and one scale a token.

    Each number is off by at most half of 1/127 of the token's largest; ternary layers quantise to as many steps.

    Buffers: ``codes``, ``[V, D]`` int8, and ``scale``, what 1 is worth, ``[V, 1]``, in the model's dtype.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("codes", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings, 1))

    @classmethod
    def of(cls, embedding: nn.Embedding) -> "Int8Embedding":
        """The same embedding, rounded."""
        with torch.device("meta"):
            rounded = cls(embedding.num_embeddings, embedding.embedding_dim)
        weight = embedding.weight.detach()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        rounded.codes, rounded.scale = (weight / scale).round().to(torch.int8), scale
        return rounded.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        return self.codes[input] * self.scale[input]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
