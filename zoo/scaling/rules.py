"""Scaling rules: from a factor of cost to factors of depth, width and resolution. Pure arithmetic.

Every rule keeps ``d w^2 r^2 = s`` exactly: that is by how much the multiply-accumulates of a network of ordinary
convolutions grow. Depthwise convolutions, heads and rounding make the counted figure differ by 5 to 10 % or more;
:func:`zoo.scale` meets a counted target where it is given one.
"""

import math
import re
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature

from zoo.axes import EFFICIENTNET, PYCLS, TINYNET, Factors, Rounding, check_factor, dimensions
from zoo.config import ModelConfig
from zoo.errors import ConfigError, nearest

_DOLLAR = "Fast and Accurate Model Scaling, arXiv:2103.06877, Section 4"


@dataclass(frozen=True)
class Rule:
    """A named way to spend a budget.

    Attributes:
        name: What ``zoo.scale(rule=...)`` takes.
        factors: ``factors(s, **options)``: the factors whose ``cost`` is ``s``. A rule for language models also takes
            ``shape``, the layers that the model has.
        source: Where it comes from.
        rounding: How its source makes whole numbers.
        dimensions: What a family must have for it.
        solve_width: Whether a target is met by width alone, with depth and resolution as the rule says.
        from_origin: Whether ``s`` and the factors are relative to the network that a family was made from.
    """

    name: str
    factors: Callable[..., Factors]
    source: str
    rounding: Rounding = PYCLS
    dimensions: tuple[str, ...] = ("depth", "width", "resolution")
    solve_width: bool = False
    from_origin: bool = False

    @property
    def options(self) -> dict[str, float]:
        """The rule's own options and their defaults."""
        parameters = list(signature(self.factors).parameters.items())[1:]
        return {name: option.default for name, option in parameters if name != "layers"}

    def for_config(self, config: ModelConfig, s: float, **options: float) -> Factors:
        """The factors for a config; only the rule ``language`` looks at it, for its number of layers."""
        if "layers" in signature(self.factors).parameters:
            options["layers"] = config.num_hidden_layers  # type: ignore[attr-defined]
        return self.factors(s, **options)


def shares(s: float, *, depth: float = 0.0, width: float = 0.0, resolution: float = 0.0) -> Factors:
    """Factors under which each dimension brings its share of the growth: shares sum to 1, ``d = s^share`` and so on."""
    check_factor("factor", s)
    return Factors(s**depth, s ** (width / 2), s ** (resolution / 2))


def fast(s: float, alpha: float = 0.8) -> Factors:
    """dWr: mostly wider. ``alpha`` is width's share; 1 is width alone, 1/3 uniform compound, 0 depth and resolution.

    Activations, which run time follows, grow as ``s^((2 - alpha) / 2)``.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha!r}; expected 0 to 1, the share of the growth that width brings.")
    return shares(s, depth=(1 - alpha) / 2, width=alpha, resolution=(1 - alpha) / 2)


def compound(s: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> Factors:
    """EfficientNet's ``d = alpha^phi, w = beta^phi, r = gamma^phi``, with the phi at which they cost ``s``."""
    check_factor("factor", s)
    phi = math.log(s) / math.log(compound_base(alpha, beta, gamma))
    return Factors(alpha**phi, beta**phi, gamma**phi)


def compound_base(alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> float:
    """By how much one step of phi multiplies the cost: ``alpha beta^2 gamma^2``, 1.92 with the paper's."""
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_factor(name, value)
    base = alpha * beta**2 * gamma**2
    if math.isclose(base, 1):
        raise ConfigError("alpha * beta^2 * gamma^2 is 1: no phi changes the cost; expected another product.")
    return base


# Cost relative to EfficientNet-B0, resolution, depth: TinyNet E to A. The costs are the original repository's MACs over
# the 387 M that the paper has for B0; resolution and depth are in its code.
_TINYNETS = ((0.062, 0.475, 0.60), (0.134, 0.68, 0.695), (0.258, 0.825, 0.85), (0.522, 0.84, 1.1), (0.876, 0.86, 1.2))


def tiny(s: float) -> Factors:
    """TinyNet's ``r(c)`` and ``d(c)`` with ``w = sqrt(c / (r^2 d))``, for a network that is to stand where B0 stood.

    The paper fits both curves with a Gaussian process over a search that was not published. Here they are drawn
    through the five networks that were: straight lines over log c, monotone, held constant beyond the ends.
    """
    check_factor("factor", s)
    if s > 1:
        raise ConfigError(f"factor is {s:g}; the tiny rule only makes networks smaller: expected at most 1.")
    i = bisect([c for c, _, _ in _TINYNETS], s)
    if i in (0, len(_TINYNETS)):
        _, r, d = _TINYNETS[min(i, len(_TINYNETS) - 1)]
    else:
        (c0, r0, d0), (c1, r1, d1) = _TINYNETS[i - 1 : i + 1]
        part = math.log(s / c0) / math.log(c1 / c0)
        r, d = r0 + part * (r1 - r0), d0 + part * (d1 - d0)
    return Factors(d, math.sqrt(s / (r**2 * d)), r)


# From ResNet-RS-50 at 160 px to ResNet-RS-420 at 320 px, depth grows 8.4 times and the side 2 times, which is 33.6
# times the cost: resolution's share of that is log 4 / log 33.6.
_RESNET_RS_RESOLUTION = math.log(4) / math.log(33.6)


def resnet_rs(s: float, epochs: float = 350) -> Factors:
    """Slow resolution, and the rest by depth where a long schedule can overfit (100 epochs or more), else by width.

    The paper gives advice, not a formula. The share of resolution is that of its own series, first to last network;
    the limit of 100 epochs, which the paper calls mixed, is our choice.
    """
    check_factor("epochs", epochs)
    rest = 1 - _RESNET_RS_RESOLUTION
    if epochs >= 100:
        return shares(s, depth=rest, resolution=_RESNET_RS_RESOLUTION)
    return shares(s, width=rest, resolution=_RESNET_RS_RESOLUTION)


# Of self-attention networks whose width and depth are in balance, the width is e^(a + b * layers), with a = 5.039 and
# b = 0.0555 in the fit of Levine et al. These two are from memory, not read in the paper again; what its abstract says
# of a trillion parameters, a width of 30,000, follows from them.
_WIDTH_PER_LAYER = 0.0555
# The best vocabulary's parameters grow as the others to this power: Tao et al., whose code (sail-sg/scaling-with-vocab,
# approach2_derivative.py) has 0.835 by derivatives and 0.4165 / 0.5 = 0.833 by equal FLOPs.
_VOCABULARY_EXPONENT = 0.83


def language(s: float, vocabulary: float = _VOCABULARY_EXPONENT, *, layers: int = 24) -> Factors:
    """Depth and width of a language model in balance, and a vocabulary that follows: ``d w^2 = s``.

    Width grows exponentially with depth, ``w = e^(0.0555 (d - 1) layers)``, so that deep models mostly become wider
    (Levine et al.). The vocabulary's parameters, rows times width, grow as ``s^0.83`` (Tao et al.): its rows as
    ``s^0.83 / w``. ``vocabulary`` is that exponent; 0 keeps the vocabulary, which another tokenizer would change.
    """
    check_factor("factor", s)
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int | float) or not 0 <= vocabulary <= 1:
        raise ConfigError(f"vocabulary is {vocabulary!r}; expected an exponent from 0 (kept) to 1.")
    rate = 2 * _WIDTH_PER_LAYER * layers
    low, high = sorted((1.0, s))
    for _ in range(100):  # log d + rate (d - 1) = log s grows with d
        d = (low + high) / 2
        low, high = (d, high) if math.log(d) + rate * (d - 1) < math.log(s) else (low, d)
    w = math.sqrt(s / d)
    return Factors(d, w, vocabulary=s**vocabulary / w if vocabulary else 1.0)


def _equal_shares(*names: str) -> Callable[[float], Factors]:
    def factors(s: float) -> Factors:
        return shares(s, **dict.fromkeys(names, 1 / len(names)))

    return factors


_EQUAL = {
    "depth": ("depth",),
    "width": ("width",),
    "resolution": ("resolution",),
    "dw": ("depth", "width"),
    "dr": ("depth", "resolution"),
    "wr": ("width", "resolution"),
    "dwr": ("depth", "width", "resolution"),
}

RULES: dict[str, Rule] = {
    **{name: Rule(name, _equal_shares(*each), _DOLLAR, dimensions=each) for name, each in _EQUAL.items()},
    "fast": Rule("fast", fast, _DOLLAR + " (dWr)"),
    "compound": Rule("compound", compound, "EfficientNet, arXiv:1905.11946, Equation 3", EFFICIENTNET),
    "tiny": Rule("tiny", tiny, "TinyNet, arXiv:2010.14819, Section 3", TINYNET, solve_width=True, from_origin=True),
    "resnet_rs": Rule("resnet_rs", resnet_rs, "Revisiting ResNets, arXiv:2103.07579, Section 6"),
    "language": Rule(
        "language",
        language,
        "The Depth-to-Width Interplay in Self-Attention, arXiv:2006.12467, Section 5.1; "
        "Scaling Laws with Vocabulary, arXiv:2407.13623",
        dimensions=("depth", "width", "vocabulary"),
    ),
}
ALIASES = {"d": "depth", "w": "width", "r": "resolution", "uniform": "dwr"}
_LETTERS = {"d": "depth", "w": "width", "r": "resolution", "g": "group"}


def get_rule(name: str) -> Rule:
    """A rule by its name, by the letters that the literature has for it, or in pycls' notation.

    The letters of ``"dw"`` have equal shares, and channels in a group grow as width does, as in the paper. pycls'
    notation gives weights, ``"d1_w8_g8_r1"``, and there, groups grow only where g is named.

    Raises:
        ConfigError: If there is none; names those there are.
    """
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name in RULES:
        return RULES[name]
    if isinstance(name, str) and re.fullmatch(r"[dwrg]\d+(\.\d+)?(_[dwrg]\d+(\.\d+)?)*", name):
        return _weighted(name)
    raise ConfigError(
        f"Unknown rule {name!r}; there are {', '.join(RULES)}, and weights such as 'd1_w8_g8_r1'.{nearest(name, RULES)}"
    )


def _weighted(name: str) -> Rule:
    """pycls' ``"d1_w8_g8_r1"``: each dimension's share is its weight over the sum of those of d, w and r."""
    weights = {part[0]: float(part[1:]) for part in name.split("_")}
    whole = sum(weight for letter, weight in weights.items() if letter != "g")
    if not whole:
        raise ConfigError(f"The rule {name!r} scales neither depth nor width nor resolution.")
    used = tuple(_LETTERS[letter] for letter, weight in weights.items() if weight and letter != "g")
    parts = {letter: weight / whole for letter, weight in weights.items()}
    return Rule(name, partial(_by_parts, parts=parts), _DOLLAR + ", in pycls' notation", dimensions=used)


def _by_parts(s: float, *, parts: Mapping[str, float]) -> Factors:
    check_factor("factor", s)
    group = s ** (parts.get("g", 0.0) / 2)
    return Factors(s ** parts.get("d", 0.0), s ** (parts.get("w", 0.0) / 2), s ** (parts.get("r", 0.0) / 2), group)


def rules_for(config: ModelConfig) -> list[str]:
    """Names of the rules that a family can follow."""
    return [rule.name for rule in RULES.values() if set(rule.dimensions) <= dimensions(config)]
