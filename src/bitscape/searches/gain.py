"""The most that mixed bits can win over uniform ones at a budget, in bits, from the spread of the scores.

A layer at b bits adds about s 4^-b to the loss and takes c b of the budget. Uniform bits spend the same b everywhere; the best real
widths give each layer what s / c deserves. Their losses differ by the factor 4^g: uniform bits need g bits more to be as good. Where
no layer reaches the narrowest or the widest bits, that factor is the arithmetic over the geometric mean of s / c, weighted by c.
Whole bits win less.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitscape.cost.policy_cost import CAPS, layer_cost
from bitscape.policy import MAX_BITS, LayerBits
from bitscape.searches.allocation import group_scores
from bitscape.searches.choices import Choices
from bitscape.searches.scores import ScoreTable

Side = Literal["weight", "activation"]
Floats = NDArray[np.float64]
LOSS_METHODS = ("fisher", "kl", "hawq")
"""Methods whose scores are rises of a loss, so that they fall as the square of the grid's spacing."""
LITTLE = 0.4
"""Below so many bits, uniform ones are nearly as good."""
HALVINGS = 60


@dataclass(frozen=True)
class Gain:
    """The most that mixed bits can win on a network at a budget."""

    bits: float
    """Bits that a uniform policy would need more to be as good; of weights or of activations, whichever is more."""
    weights: float | None
    """Of the widths of weights; None where no cap depends on them."""
    activations: float | None
    """Of the widths of activations; None where no cap depends on them."""

    def __str__(self) -> str:
        if self.bits < LITTLE:
            return f"mixed bits can win at most {self.bits:.1f} bits here: uniform bits are enough"
        return f"mixed bits can win at most {self.bits:.1f} bits here: uniform bits would need that many more to be as good"


def gain_of(scores: ScoreTable, choices: Choices) -> Gain | None:
    """Return the gain that scores promise; None for scores that are no losses, and caps that do not add up over layers."""
    kinds = [kind for kind in choices.budget.caps if CAPS[kind].combine == "sum" and not CAPS[kind].measured]
    if scores.method not in LOSS_METHODS or not kinds or not choices.freedom.groups:
        return None
    sides: tuple[Side, Side] = ("weight", "activation")
    by_side = {
        side: max((_gain(scores, choices, kind, side) for kind in kinds if side in CAPS[kind].depends_on), default=None)
        for side in sides
    }
    known = [bits for bits in by_side.values() if bits is not None]
    return Gain(max(known), by_side["weight"], by_side["activation"])


def spread_gain(sensitivity: Floats, price: Floats, mean: float, least: float, most: float) -> float:
    """Bits by which uniform widths of `mean` lose against the best real widths from `least` to `most` of the same total price.

    sensitivity: s of each layer, at least 0; price: c of each, at least 0.
    """
    counted = (price > 0) & (sensitivity > 0)
    s, c = sensitivity[counted], price[counted]
    free = price[price > 0].sum() - c.sum()  # of layers that no bits help: they take the least
    total = mean * (c.sum() + free) - least * free
    if not len(s) or not least < mean < most:
        return 0.0

    def widths(log_price: float) -> Floats:
        return np.clip(np.log2(s / c) / 2 - log_price, least, most)

    low, high = float(np.log2(s / c).min() / 2 - most), float(np.log2(s / c).max() / 2 - least)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float((c * widths(middle)).sum()) > total else (low, middle)
    best = float((s * 4.0 ** -widths(high)).sum())
    return max(0.0, math.log2(float((s * 4.0**-mean).sum()) / best) / 2)


def _gain(scores: ScoreTable, choices: Choices, kind: str, side: Side) -> float:
    offered = sorted({getattr(bits, side) for bits in choices.offered})
    mean = _uniform_width(choices, kind)
    if len(offered) < 2 or not offered[0] < mean < offered[-1]:
        return 0.0
    narrow = min(offered[:-1], key=lambda bits: abs(bits - mean))
    values = group_scores(scores, choices)
    rows = [
        (_at(choices, row, side, narrow) - _at(choices, row, side, offered[-1]), _price(choices, group, kind, side))
        for row, group in zip(values, choices.freedom.groups, strict=True)
        if side == "weight" or group[0] not in choices.freedom.activations
    ]
    if not rows:
        return 0.0
    rises, prices = np.array(rows, dtype=np.float64).T
    sensitivity = np.maximum(rises, 0.0) / (4.0**-narrow - 4.0 ** -offered[-1])
    return spread_gain(sensitivity, prices, mean, offered[0], offered[-1])


def _at(choices: Choices, row: Floats, side: Side, bits: int) -> float:
    """The group's score at so many bits of one side, with the most of the other."""
    columns = [index for index, pair in enumerate(choices.candidates) if getattr(pair, side) == bits and np.isfinite(row[index])]
    return float(min((row[index] for index in columns), default=0.0))


def _price(choices: Choices, group: tuple[str, ...], kind: str, side: Side) -> float:
    """What a bit more costs a group."""
    most, least = LayerBits.EIGHT, LayerBits(1, MAX_BITS) if side == "weight" else LayerBits(MAX_BITS, 1)
    layers = [choices.network.by_name[name] for name in group]
    return sum(layer_cost(kind, layer, most) - layer_cost(kind, layer, least) for layer in layers) / (MAX_BITS - 1)


def _uniform_width(choices: Choices, kind: str) -> float:
    """The real width at which uniform bits of the free layers cost what the cap allows."""
    limit = CAPS[kind].limit(choices.network, choices.budget.caps[kind])
    row = choices.row(kind, limit)
    layers = [choices.network.by_name[name] for group in choices.freedom.groups for name in group]
    costs = [row.fixed + sum(layer_cost(kind, layer, LayerBits(b, b)) for layer in layers) for b in range(1, MAX_BITS + 1)]
    return float(np.interp(limit, costs, range(1, MAX_BITS + 1)))
