"""A first-order linear recurrence in PyTorch operators over whole sequences: for any device, and what is exported.

Such a recurrence is a scan with an associative operator, so it halves: each pair of steps makes one step of a
recurrence of half the length (Blelloch, 1990). The work is linear in the length and there are log2(T) rounds of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """``h[t] = a[t] h[t-1] + b[t]`` along ``dim``, which is -1 or -2, from 0; ``a`` and ``b`` have one shape."""
    length = b.shape[dim]
    if length <= 1:
        return b
    pad = (0, 0) * (-1 - dim)

    def every_other(x: Tensor, start: int) -> Tensor:
        return x[..., start::2] if dim == -1 else x[..., start::2, :]

    pairs = length // 2
    a_odd, b_odd, a_even, b_even = every_other(a, 1), every_other(b, 1), every_other(a, 0), every_other(b, 0)
    # h at 1, 3, 5, ...: two steps at a time
    first_a, first_b = a_even.narrow(dim, 0, pairs), b_even.narrow(dim, 0, pairs)
    h_odd = linear_scan(a_odd * first_a, a_odd * first_b + b_odd, dim)
    # h at 0, 2, 4, ...: one step from those
    before = F.pad(h_odd.narrow(dim, 0, length - pairs - 1), (*pad, 1, 0))
    h_even = a_even * before + b_even
    both = torch.stack((h_even, F.pad(h_odd, (*pad, 0, length % 2))), dim)
    return both.flatten(dim - 1, dim).narrow(dim, 0, length)
