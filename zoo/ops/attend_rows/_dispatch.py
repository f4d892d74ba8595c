"""The implementations of attention to a ragged cache, best first."""

from types import SimpleNamespace

from zoo.ops._dispatch import Candidate, Choice, cpp, triton
from zoo.ops.attend_rows import cpu, gathered
from zoo.ops.attend_rows.reference import attend_rows_reference

choose = Choice(
    "attend_rows",
    (
        cpp(cpu, cpu.EXTENSION),
        triton("zoo.ops.attend_rows.triton_impl"),
        Candidate("torch", lambda: gathered),
    ),
    reference=SimpleNamespace(forward=attend_rows_reference),
)
