"""What images cost on a network whose bits depend on them, as the commands print it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from bitscape.cli.network import uniform_cost
from bitscape.cli.output import amount, print_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.cost.layers import NetworkProfile
    from bitscape.engine.spending import Spent
    from bitscape.policy import Policy


def print_spent(network: "nn.Module", noted: "Sequence[Spent]") -> bool:
    """Print what images cost on a dynamic network or on tiers, as `noting_spent` noted it; False, and nothing printed, for any other."""
    from bitscape.dynamic import DynamicNetwork, TieredNetwork
    from bitscape.dynamic.tiers import shares_of

    if isinstance(network, DynamicNetwork):
        _print_costs(noted, network.decision_bitops, network.cost)
    elif isinstance(network, TieredNetwork):
        _print_costs(noted, network.gate_bitops, network.cost)
        click.echo()
        tiers = [spent.tiers for spent in noted if spent.tiers is not None]
        print_tiers(network.policies, network.cost, shares_of(tiers, len(network.policies)))
    else:
        return False
    return True


def _print_costs(noted: "Sequence[Spent]", deciding: float, cost: "NetworkProfile") -> None:
    import torch

    bits, bitops = (torch.cat(values).double() for values in ([each.bits for each in noted], [each.bitops for each in noted]))
    eight = uniform_cost(cost, 8)["bitops"]
    rows = [
        ["mean_activation_bits", *(f"{value:.4g}" for value in _spread(bits)), "8", f"{100 * float(bits.mean()) / 8:.1f} %"],
        ["bitops", *(amount(value) for value in _spread(bitops)), amount(eight), f"{100 * float(bitops.mean()) / eight:.1f} %"],
    ]
    print_table(["cost of one image", "mean", "least", "most", "8 bit", "of 8 bit"], rows)
    click.echo(f"deciding on the bits takes {100 * deciding / float(bitops.mean()):.2f} % of these BitOps")


def _spread(values: "Tensor") -> tuple[float, float, float]:
    return float(values.mean()), float(values.min()), float(values.max())


def print_tiers(policies: "Sequence[Policy]", cost: "NetworkProfile", shares: Sequence[float]) -> None:
    """Print bits and BitOps of each tier, the gate left out, and its share of the images."""
    from bitscape.cost.policy_cost import policy_cost

    rows = []
    for at, (policy, share) in enumerate(zip(policies, shares, strict=True), start=1):
        costs = policy_cost(cost, policy)
        means = [f"{costs[kind]:.4g}" for kind in ("mean_weight_bits", "mean_activation_bits")]
        rows.append([f"tier{at}", *means, amount(costs["bitops"]), f"{100 * share:.1f} %"])
    print_table(["tier", "mean weight bits", "mean activation bits", "BitOps", "of the images"], rows)
