"""What the images of a DynamicNetwork may cost: where its decisions begin, and what they are held to after training."""

from typing import Literal, cast

import torch
from torch import Tensor

from bitscape.dynamic.heads import Head
from bitscape.dynamic.network import DynamicNetwork, decide
from bitscape.errors import BitscapeError

HALVINGS = 12
"""Of the range in which a width or a shift is sought."""
USUAL_SHIFT = 16.0
"""Bits; within twice this, nearly every head can be brought from the largest width to the least one."""
LARGEST_SHIFT = 2.0**16
"""Bits; heads that decide further beyond the largest width than this cannot be brought to the least one."""


@torch.no_grad()
def begin_at(network: DynamicNetwork, bitops: float) -> float:
    """Let the decisions of a new network begin at the width that costs `bitops` if every layer has it; return that width."""
    low, high = float(network.bits.low), float(network.bits.high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cost = float(network.level(middle, 1).bitops(network.cost)) + network.decision_bitops
        low, high = (middle, high) if cost <= bitops else (low, middle)
    for head in network.heads:
        cast(Head, head).begin_at(low)
    return low


def keep_bitops(network: DynamicNetwork, images: Tensor, bitops: float, *, budget_of: Literal["batch", "image"] = "batch") -> float:
    """Set `shift` to the largest value at which images cost `bitops` or less, on average or each; return that average or the largest cost.

    One trained network so serves budgets near the one it was trained for. The decision's own cost counts.

    Raises:
        BitscapeError: a budget below the cost of the least widths.
    """

    def cost(shift: float) -> float:
        network.shift.fill_(shift)
        each = decide(network, images).bitops(network.cost)
        return float(each.mean() if budget_of == "batch" else each.max()) + network.decision_bitops

    low, high, before = -USUAL_SHIFT, USUAL_SHIFT, float(network.shift)
    least = cost(low)
    while least > bitops and low > -LARGEST_SHIFT:
        low, high = 2 * low, low
        least = cost(low)
    if least > bitops:
        network.shift.fill_(before)
        raise BitscapeError(f"bitops = {bitops:.4g}: images cost {least:.4g} at the least widths; give more, or a lower `low`")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= bitops else (low, middle)
    return cost(low)
