"""What a soft choice of bits is expected to cost, and the price of bits at which it costs what the budget allows.

With logits u of a group's weight widths, v of its activation widths and a price lambda for each cap, the shares are

    p ~ exp(u_w - sum lambda c_w),   q ~ exp(v_a - sum lambda c_a)

where c_w is the expected cost of a width, as a share of the cap, with the other tensor's shares as they are (and c_a likewise).
A price is zero where its cap holds anyway, and otherwise the one at which the expected cost is exactly the cap.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from bitscape.policy import LayerBits
from bitscape.search.allocation import choices
from bitscape.search.knapsack import reachable
from bitscape.search.problem import SearchProblem

MEAN_FIELD_STEPS = 4
"""Rounds in which the shares of weights and of activations answer each other."""
HALVINGS = 24
DEAREST = 2.0**14
"""Prices are searched up to here; a width that costs 1 % of the cap more then has a share of e^-160."""
ROUNDS = 3
"""With several caps, the prices are set in turn, so often."""


@dataclass(frozen=True, eq=False)
class SoftCost:
    """Expected costs of G groups of layers under R_w weight and R_a activation widths, in units of each cap."""

    kinds: tuple[str, ...]
    """Capped costs that add up over layers, K of them."""
    tables: Tensor
    """Cost of every pair as a share of the cap: (K, G, R_w, R_a)."""
    fixed: Tensor
    """Share of each cap that pinned layers take: (K,)."""
    forbidden: tuple[Tensor, Tensor]
    """Infinity for widths that no policy within the caps has, else zero: (G, R_w) and (G, R_a)."""

    def expected(self, weight_shares: Tensor, activation_shares: Tensor) -> Tensor:
        """Share of each cap (K,) that is used under (G, R_w) and (G, R_a) shares; 1 is exactly the cap."""
        return torch.einsum("gw,kgwa,ga->k", weight_shares, self.tables, activation_shares) + self.fixed

    @torch.no_grad()
    def prices(self, weight_logits: Tensor, activation_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to take off the logits (G, R_w) and (G, R_a) so that the expected costs are within the caps."""
        each = [0.0] * len(self.kinds)
        for _ in range(ROUNDS if len(each) > 1 else 1):
            for at in range(len(each)):
                each[at] = self._price(at, each, weight_logits, activation_logits)
        return self._answer(each, weight_logits, activation_logits)

    def _price(self, at: int, each: list[float], weight_logits: Tensor, activation_logits: Tensor) -> float:
        """The smallest price of cap `at`, by halving, with those of the others kept."""

        def holds(price: float) -> bool:
            off = self._answer([*each[:at], price, *each[at + 1 :]], weight_logits, activation_logits)
            shares = (weight_logits - off[0]).softmax(1), (activation_logits - off[1]).softmax(1)
            return bool(self.expected(*shares)[at] <= 1)

        low, high = 0.0, 1.0
        if holds(low):
            return low
        while not holds(high) and high < DEAREST:
            low, high = high, 2 * high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def _answer(self, each: list[float], weight_logits: Tensor, activation_logits: Tensor) -> tuple[Tensor, Tensor]:
        off = self.forbidden
        table = torch.einsum("k,kgwa->gwa", torch.tensor(each, device=self.tables.device), self.tables)
        for _ in range(MEAN_FIELD_STEPS):
            weight_shares, activation_shares = (weight_logits - off[0]).softmax(1), (activation_logits - off[1]).softmax(1)
            of_weights = torch.einsum("gwa,ga->gw", table, activation_shares)
            of_inputs = torch.einsum("gwa,gw->ga", table, weight_shares)
            off = self.forbidden[0] + of_weights, self.forbidden[1] + of_inputs
        return off


def soft_cost(problem: SearchProblem, weight_bits: list[int], activation_bits: list[int]) -> SoftCost:
    """Tabulate the problem's capped costs for every pair of widths. Raises InfeasibleBudget if no policy fits."""
    pairs = tuple(LayerBits(w, a) for w, a in product(weight_bits, activation_bits))
    stated = choices(problem.network, problem.parsed_budget, pairs, problem.pinned_layers, problem.tied)
    stated.first_feasible()
    shape, device = (len(stated.freedom.groups), len(weight_bits), len(activation_bits)), problem.images.device
    allowed = reachable(stated.everything(), stated.caps)
    assert allowed is not None, "a choice fits"
    free = torch.tensor(allowed, device=device).reshape(shape)
    rows = [row for row in stated.caps if row.additive]  # a peak only forbids widths
    tables = [(row.costs / row.limit).astype(np.float32).reshape(shape) for row in rows]
    return SoftCost(
        tuple(row.name for row in rows),
        torch.tensor(np.array(tables).reshape(len(rows), *shape), device=device),
        torch.tensor([row.fixed / row.limit for row in rows], device=device),
        (_infinite(~free.any(2)), _infinite(~free.any(1))),
    )


def _infinite(where: Tensor) -> Tensor:
    return torch.zeros(where.shape, device=where.device).masked_fill(where, torch.inf)
