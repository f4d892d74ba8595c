"""The gated recurrence: every implementation against the reference, the operator, and what it refuses."""

import torch
from torch.testing import assert_close

from zoo.ops import hgrn_scan


def test_by_hand() -> None:
    f = torch.tensor([0.5, 0.5, 0.25]).view(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    states, last_state = hgrn_scan(f, v, torch.tensor([[4.0]]))
    assert_close(states.flatten(), torch.tensor([3.0, 3.5, 3.875]))
    assert_close(last_state, torch.tensor([[3.875]]))
