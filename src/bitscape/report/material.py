"""Everything the sections draw on, worked out once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bitscape.cost.latency import with_latency
from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import policy_cost
from bitscape.errors import BitscapeError, prefixed
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.report.compare import Comparison, Group, comparisons, groups
from bitscape.report.inputs import Inputs
from bitscape.report.policies import Shown, caps_of, chosen, distinct
from bitscape.words import cost_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What was read, and the network if it was named.

    Raises BitscapeError, naming the file, if a policy or a latency table does not fit the network.
    """

    inputs: Inputs
    network: NetworkProfile | None = None
    """Of the float network; None leaves out what only it tells."""
    model: str | None = None
    """What the network is called; None: as the policies call it."""
    command: str | None = None
    """That makes the report."""

    def __post_init__(self) -> None:
        if self.network is None:
            return
        for name, policy in self.inputs.policies.items():
            with prefixed(name):
                policy.check(self.network.shapes)
        for name, table in list(self.inputs.latencies.items())[:1]:  # of several tables the first
            with prefixed(name):
                object.__setattr__(self, "network", with_latency(self.network, table))

    @cached_property
    def policies(self) -> tuple[Shown, ...]:
        """The different policies."""
        return distinct(self.inputs)

    @cached_property
    def chosen(self) -> Shown | None:
        """The policy that the report is about."""
        return chosen(self.policies)

    @cached_property
    def caps(self) -> Mapping[str, float]:
        """Of the budget of the chosen policy."""
        return caps_of(self.chosen.policy) if self.chosen else {}

    @cached_property
    def title(self) -> str:
        """Of the report."""
        told = self.model or (self.chosen.policy.provenance.get("model") if self.chosen else None)
        return f"Quantization report: {told.rpartition(':')[2]}" if isinstance(told, str) else "Quantization report"

    @cached_property
    def groups(self) -> list[Group]:
        """Runs that ended, together with those of other seeds."""
        return groups(self.inputs.runs.values())

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Groups against the best uniform one."""
        return comparisons(self.groups)

    @cached_property
    def eight_bits(self) -> Mapping[str, float]:
        """Cost with every layer at 8 bits; {} without the network."""
        return self.costs(uniform_policy(self.network.by_name, LayerBits(8, 8))) if self.network else {}

    def costs(self, policy: Policy) -> Mapping[str, float]:
        """Every known cost: counted on the network, else as the policy file tells."""
        if self.network is None:
            return policy.cost
        try:
            return policy_cost(self.network, policy)
        except BitscapeError:  # bits that the latency table lacks
            return policy_cost(without_latency(self.network), policy)

    def cost_words(self, policy: Policy, *kinds: str) -> list[str]:
        """Costs of these kinds in their units."""
        own = self.costs(policy)
        return [cost_text(kind, own.get(kind)) for kind in kinds]

    def in_call_order(self, policy: Policy) -> dict[str, LayerBits]:
        """Layer -> bits, in the order in which the network calls them, else in the file's, which a search writes in that order."""
        order = [] if self.network is None else [name for name in self.network.by_name if name in policy.layers]
        return {name: policy.layers[name] for name in dict.fromkeys([*order, *policy.layers])}


def without_latency(network: NetworkProfile) -> NetworkProfile:
    """The network as it was before a latency table was joined."""
    return replace(network, layers=tuple(replace(layer, latency_ns={}, flash_bytes={}, sram_bytes={}) for layer in network.layers))
