"""Operators that several implementations compete for, each behind one function that chooses among them."""

from zoo.ops.selective_scan import selective_scan

__all__ = ["selective_scan"]
