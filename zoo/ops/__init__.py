"""Operators that several implementations compete for, each behind one function that chooses among them."""

from zoo.ops.attend_rows import attend_rows
from zoo.ops.bit_linear import bit_linear, packed_bit_linear
from zoo.ops.hgrn_scan import hgrn_scan
from zoo.ops.selective_scan import selective_scan

__all__ = ["attend_rows", "bit_linear", "hgrn_scan", "packed_bit_linear", "selective_scan"]
