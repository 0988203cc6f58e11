"""What images cost on a network whose bits depend on them: noted while it runs, and printed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from bitscape.cli.network import measure_network, uniform_cost
from bitscape.cli.output import amount, print_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.cost.layers import NetworkCost
    from bitscape.policy import Policy


@dataclass
class Noted:
    """Of every image that ran, batch by batch; nothing of a network whose bits are static."""

    bits: "list[Tensor]" = field(default_factory=list)
    """Mean activation bits."""
    bitops: "list[Tensor]" = field(default_factory=list)
    """BitOps, those of deciding included."""
    tiers: "list[Tensor]" = field(default_factory=list)
    """The tier, from 0, if there are any."""


@contextmanager
def noting(network: "nn.Module") -> Iterator[Noted]:
    """Within the block, note what images cost on a dynamic network or on tiers."""
    from bitscape.dynamic import DynamicNetwork
    from bitscape.dynamic.tiers import TieredNetwork

    noted = Noted()

    def note(module: "nn.Module", *_: object) -> None:
        if isinstance(module, DynamicNetwork | TieredNetwork):
            spent = module.spent
            noted.bits.append(spent.bits)
            noted.bitops.append(spent.bitops)
        if isinstance(module, TieredNetwork):
            noted.tiers.append(module.tiers)

    handle = network.register_forward_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def print_spent(network: "nn.Module", noted: Noted, shape: tuple[int, ...]) -> bool:
    """Print what images of `shape` cost on a dynamic network or on tiers; False, and nothing printed, for any other network."""
    from bitscape.dynamic import DynamicNetwork
    from bitscape.dynamic.tiers import TieredNetwork

    if isinstance(network, DynamicNetwork):
        _print_costs(noted, network.decision_bitops, network.cost)
    elif isinstance(network, TieredNetwork):
        cost = measure_network(network.networks[0], shape)
        _print_costs(noted, network.gate_bitops, cost)
        click.echo()
        print_tiers(network.policies, cost, shares_of(noted.tiers, len(network.policies)))
    else:
        return False
    return True


def _print_costs(noted: Noted, deciding: float, cost: "NetworkCost") -> None:
    import torch

    bits, bitops = torch.cat(noted.bits).double(), torch.cat(noted.bitops).double()
    eight = uniform_cost(cost, 8)["bitops"]
    rows = [
        ["mean_activation_bits", *(f"{value:.4g}" for value in _spread(bits)), "8", f"{100 * float(bits.mean()) / 8:.1f} %"],
        ["bitops", *(amount(value) for value in _spread(bitops)), amount(eight), f"{100 * float(bitops.mean()) / eight:.1f} %"],
    ]
    print_table(["cost of one image", "mean", "least", "most", "8 bit", "of 8 bit"], rows)
    click.echo(f"deciding on the bits takes {100 * deciding / float(bitops.mean()):.2f} % of these BitOps")


def _spread(values: "Tensor") -> tuple[float, float, float]:
    return float(values.mean()), float(values.min()), float(values.max())


def shares_of(tiers: "Sequence[Tensor]", count: int) -> list[float]:
    """Share of the images, given by batches of their tiers, that each of `count` tiers gets."""
    import torch

    chosen = torch.cat(list(tiers))
    shares: list[float] = (chosen.bincount(minlength=count).double() / len(chosen)).tolist()
    return shares


def print_tiers(policies: "Sequence[Policy]", cost: "NetworkCost", shares: Sequence[float]) -> None:
    """Print bits and BitOps of each tier, the gate left out, and its share of the images."""
    from bitscape.cost.policy_cost import policy_cost

    rows = []
    for at, (policy, share) in enumerate(zip(policies, shares, strict=True), start=1):
        costs = policy_cost(cost, policy)
        means = [f"{costs[kind]:.4g}" for kind in ("mean_weight_bits", "mean_activation_bits")]
        rows.append([f"tier{at}", *means, amount(costs["bitops"]), f"{100 * share:.1f} %"])
    print_table(["tier", "mean weight bits", "mean activation bits", "BitOps", "of the images"], rows)
