"""The implementations of the gated recurrence, best first."""

from types import SimpleNamespace

from zoo.ops._dispatch import Candidate, Choice, cpp, triton
from zoo.ops.hgrn_scan import cpu, vectorised
from zoo.ops.hgrn_scan.reference import hgrn_scan_reference


def _reference(*inputs: object) -> object:
    return hgrn_scan_reference(*inputs)[0]  # type: ignore[arg-type]


choose = Choice(
    "hgrn_scan",
    (cpp(cpu, cpu.EXTENSION), triton("zoo.ops.hgrn_scan.triton_impl"), Candidate("torch", lambda: vectorised)),
    # hgrn_scan() does not come here for "ref": nothing inside an operator is seen by autograd
    reference=SimpleNamespace(forward=_reference, backward=vectorised.backward),
)
