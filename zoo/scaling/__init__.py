"""Scaling: a model of the zoo made larger or smaller by a rule from the literature, towards a budget."""

from zoo.axes import Factors, Rounding, resize
from zoo.scaling.grow import Growth, grow
from zoo.scaling.rules import RULES, Rule, get_rule, rules_for
from zoo.scaling.solver import Fit, ScalingWarning, counts_of, fit, scale

__all__ = [
    "RULES",
    "Factors",
    "Fit",
    "Growth",
    "Rounding",
    "Rule",
    "ScalingWarning",
    "counts_of",
    "fit",
    "get_rule",
    "grow",
    "resize",
    "rules_for",
    "scale",
]
