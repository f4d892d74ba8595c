"""Recording what a GPU does, to start all of it at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis.benchmark import as_current
from zoo.errors import ShapeError


def record(call: Callable[[], object], device: torch.device, warmup: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what a call starts on the GPU; replaying it writes over the tensors that the last call made.

    Args:
        call: What to record; it must take and give the same tensors each time.
        device: The GPU.
        warmup: Calls before, in which libraries choose their kernels and get their memory.
    """
    with as_current(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # torch's own stream is of the GPU that was recorded first
            call()
    return graph


class CudaGraph(nn.Module):
    """A model, or another function of tensors, whose kernels are recorded at its first call and replayed as one after.

    For one shape of input.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._output: Any = None

    def forward(self, *inputs: Tensor) -> Any:
        if self._graph is None:
            self._record(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        if isinstance(self._output, Tensor):
            return self._output.clone()  # the next replay writes over it
        return type(self._output)(each.clone() for each in self._output)

    @torch.inference_mode(False)  # its tensors are written over outside of that mode too
    @torch.no_grad()
    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].is_cuda:
            raise ShapeError(f"The input is on {inputs[0].device}; expected a GPU, where there are kernels to record.")
        self._inputs = [x.clone() for x in inputs]

        def call() -> None:
            self._output = self.model(*self._inputs)

        self._graph = record(call, inputs[0].device)
