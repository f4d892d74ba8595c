"""Recording what a GPU does, to start all of it at once."""

from collections.abc import Callable

import torch

from zoo.analysis.benchmark import as_current


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
