"""Writing with a language model on a GPU without starting its kernels one by one.

The cache of a recurrence keeps its size, so that each step of one token is the same work on the same tensors: it is
recorded as a CUDA graph, once for a size of batch, and replayed. On an eager step the processor spends many times what
the GPU needs.
"""

from typing import Any, Self

import torch
from torch import Tensor

from zoo.deploy.cuda_graph import record
from zoo.models._causal_lm import Trunk, TrunkCache, TrunkOutput


class ReplayedSteps:
    """The ``forward`` of a trunk with a recurrent cache: steps of one token are replayed, all else runs as before.

    The weights must stay where they are from the first step on.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.steps: dict[Any, _Step] = {}

    def __call__(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: TrunkCache | None = None,
        keep_states: bool = False,
        **options: Any,
    ) -> TrunkOutput:
        step_only = x.is_cuda and x.shape[1] == 1 and not keep_states and not torch.is_grad_enabled()
        if not step_only or cache is None or not cache.tensors:
            return type(self.trunk).forward(self.trunk, x, mask=mask, cache=cache, keep_states=keep_states, **options)
        key = (x.shape, x.dtype, x.device)
        if key not in self.steps:
            self.steps[key] = _Step(self.trunk, x, cache)
        return TrunkOutput(self.steps[key](x, mask, cache))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """For the copy of the trunk; a recording is of one trunk's weights only."""
        return type(self)(memo[id(self.trunk)])


class _Step:
    """A recorded step, and the tensors that it reads and writes."""

    @torch.inference_mode(False)  # the tensors are written over outside of that mode too
    @torch.no_grad()
    def __init__(self, trunk: Trunk, x: Tensor, cache: TrunkCache) -> None:
        self.x = x.clone()
        self.mask = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        self.keys = list(cache.tensors)
        self.states = [tensor.clone() for tensor in cache.tensors.values()]

        def step() -> None:
            inner = TrunkCache(cache.config)
            inner.tensors = dict(zip(self.keys, self.states, strict=True))
            self.hidden = type(trunk).forward(trunk, self.x, mask=self.mask, cache=inner).hidden
            self.after = torch.stack([inner.tensors[key] for key in self.keys])

        self.graph = record(step, x.device)

    def __call__(self, x: Tensor, mask: Tensor | None, cache: TrunkCache) -> Tensor:
        self.x.copy_(x)
        if mask is None:
            self.mask.fill_(True)
        else:
            self.mask.copy_(mask[:, -1:])
        torch._foreach_copy_(self.states, [cache.tensors[key] for key in self.keys])
        self.graph.replay()
        # Copies: the next replay, which may be for another cache, writes over these.
        cache.tensors = dict(zip(self.keys, self.after.clone().unbind(), strict=True))
        return self.hidden.clone()


def replay_steps(model: Any) -> Any:
    """Let a language model with a recurrent cache replay its steps, in place; gives the model."""
    model.model.forward = ReplayedSteps(model.model)
    return model
