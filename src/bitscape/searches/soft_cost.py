"""What a soft choice of bits is expected to cost, and the price of bits at which it costs what the budget allows.

With logits u of a group's weight widths, v of its activation widths and a price lambda for each cap, the shares are

    p ~ exp(u_w - sum lambda c_w),   q ~ exp(v_a - sum lambda c_a)

where c_w is the expected cost of a width, as a share of the cap, with the other tensor's shares as they are (and c_a likewise).
A price is zero where its cap holds anyway, and otherwise the one at which the expected cost is exactly the cap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from bitscape.policy import LayerBits
from bitscape.searches.knapsack import reachable
from bitscape.searches.problem import SearchProblem

Floats = NDArray[np.float64]

MEAN_FIELD_STEPS = 4
"""Rounds in which the shares of weights and of activations answer each other."""
HALVINGS = 24
DEAREST = 2.0**14
"""Prices are searched up to here; a width that costs 1 % of the cap more then has a share of e^-160."""
ROUNDS = 3
"""With several caps, the prices are set in turn, so often."""


@dataclass(frozen=True, eq=False)
class SoftCost:
    """Expected costs of G groups of layers under R_w weight and R_a activation widths, in units of each cap.

    All is computed on the CPU: these are small tables, and a GPU would be waited for at each halving.
    """

    kinds: tuple[str, ...]
    """Capped costs that add up over layers, K of them."""
    tables: Floats
    """Cost of every pair as a share of the cap: (K, G, R_w, R_a)."""
    fixed: Floats
    """Share of each cap that pinned layers take: (K,)."""
    forbidden: tuple[Floats, Floats]
    """Infinity for widths that no policy within the caps has, else zero: (G, R_w) and (G, R_a)."""

    def expected(self, weight_shares: Tensor, activation_shares: Tensor) -> dict[str, float]:
        """Kind -> share of its cap that is used under (G, R_w) and (G, R_a) shares; 1 is exactly the cap."""
        used = self._used(_array(weight_shares), _array(activation_shares))
        return dict(zip(self.kinds, used.tolist(), strict=True))

    def prices(self, weight_logits: Tensor, activation_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to take off the logits (G, R_w) and (G, R_a) so that the expected costs are within the caps."""
        logits = _array(weight_logits), _array(activation_logits)
        each = [0.0] * len(self.kinds)
        for _ in range(ROUNDS if len(each) > 1 else 1):
            for at in range(len(each)):
                each[at] = self._price(at, each, logits)
        of_weights, of_inputs = self._answer(each, logits)
        return torch.from_numpy(of_weights).to(weight_logits), torch.from_numpy(of_inputs).to(activation_logits)

    def _price(self, at: int, each: Sequence[float], logits: tuple[Floats, Floats]) -> float:
        """The smallest price of cap `at`, by halving, with those of the others kept."""

        def holds(price: float) -> bool:
            off = self._answer([*each[:at], price, *each[at + 1 :]], logits)
            shares = (softmax(logits[side] - off[side], axis=1) for side in (0, 1))
            return bool(self._used(*shares)[at] <= 1)

        low, high = 0.0, 1.0
        if holds(low):
            return low
        while not holds(high) and high < DEAREST:
            low, high = high, 2 * high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def _answer(self, each: Sequence[float], logits: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        off = self.forbidden
        table = np.tensordot(np.array(each), self.tables, axes=1)
        for _ in range(MEAN_FIELD_STEPS):
            weight_shares, activation_shares = (softmax(logits[side] - off[side], axis=1) for side in (0, 1))
            of_weights = (table @ activation_shares[:, :, None])[:, :, 0]
            of_inputs = (weight_shares[:, None] @ table)[:, 0]
            off = self.forbidden[0] + of_weights, self.forbidden[1] + of_inputs
        return off

    def _used(self, weight_shares: Floats, activation_shares: Floats) -> Floats:
        by_group = weight_shares[:, None] @ self.tables @ activation_shares[:, :, None]
        used: Floats = by_group.sum(axis=(1, 2, 3)) + self.fixed
        return used


def soft_cost(problem: SearchProblem, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> SoftCost:
    """Tabulate the problem's capped costs for every pair of widths. Raises InfeasibleBudget if no policy fits."""
    problem.choices.check_feasible()  # not every pair of widths need be a candidate
    pairs = tuple(LayerBits(w, a) for w, a in product(weight_bits, activation_bits))
    stated = problem.choices.in_all_pairs(pairs)
    shape = (len(stated.freedom.groups), len(weight_bits), len(activation_bits))
    allowed = reachable(stated.allowed, stated.caps)
    assert allowed is not None, "a choice fits"
    free = allowed.reshape(shape)
    rows = [row for row in stated.caps if row.additive]  # a peak only forbids widths
    tables = [(row.costs / row.limit).astype(np.float64).reshape(shape) for row in rows]
    return SoftCost(
        tuple(row.name for row in rows),
        np.array(tables).reshape(len(rows), *shape),
        np.array([row.fixed / row.limit for row in rows]),
        (np.where(free.any(2), 0.0, np.inf), np.where(free.any(1), 0.0, np.inf)),
    )


def _array(values: Tensor) -> Floats:
    return values.detach().cpu().double().numpy()
