"""The implementations of BitLinear, best first."""

from types import SimpleNamespace

from zoo.ops._dispatch import Candidate, Choice, cpp, triton
from zoo.ops.bit_linear import cpu, vectorised
from zoo.ops.bit_linear.reference import bit_linear_reference, packed_bit_linear_reference

choose = Choice(
    "bit_linear",
    (
        cpp(
            cpu,
            cpu.EXTENSION,
            float64=False,
            reason=lambda: f"compiled for this processor, which has {cpu.kernels()[0]}",
        ),
        triton("zoo.ops.bit_linear.triton_impl"),
        Candidate("torch", lambda: vectorised),
    ),
    # bit_linear() does not come here for "ref": nothing inside an operator is seen by autograd
    reference=SimpleNamespace(forward=bit_linear_reference, packed_forward=packed_bit_linear_reference),
)
