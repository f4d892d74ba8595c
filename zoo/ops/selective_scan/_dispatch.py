"""The implementations of the selective scan, best first."""

from types import SimpleNamespace

from zoo.ops._dispatch import Candidate, Choice, cpp, triton
from zoo.ops.selective_scan import cpu, mamba, vectorised
from zoo.ops.selective_scan.reference import selective_scan_reference

choose = Choice(
    "selective_scan",
    (
        cpp(cpu, cpu.EXTENSION),
        Candidate(
            "mamba",
            lambda: mamba,
            device="cuda",
            unavailable=lambda: mamba.unavailable(),
            float64=False,
            reason=lambda: "mamba-ssm is installed",
            hint='It needs a CUDA GPU and pip install "efficient-zoo[cuda]".',
        ),
        triton("zoo.ops.selective_scan.triton_impl"),
        Candidate("torch", lambda: vectorised),
    ),
    # selective_scan() does not come here for "ref": nothing inside an operator is seen by autograd
    reference=SimpleNamespace(forward=selective_scan_reference, backward=vectorised.backward),
)
