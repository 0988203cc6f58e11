"""Choices: the allocation problem as plain data: which bits each layer may get, and what all of them may cost."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import Any, NoReturn

import numpy as np

from bitscape.cost.budget import Budget, BudgetText, budget_kinds, lasting, parse_budget
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import NO_EFFECT, NetworkProfile
from bitscape.cost.policy_cost import cap, layer_cost, layer_latency_ns, policy_cost
from bitscape.cost.targets import Target
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.searches.freedom import FreeLayers, Pins, free_layers
from bitscape.searches.knapsack import CapRow, smallest, solve
from bitscape.searches.programme import Allowed, Choice
from bitscape.searches.scores import check_candidates

DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 8)
DEFAULT_CANDIDATES = tuple(LayerBits(w, a) for w, a in product(DEFAULT_WIDTHS, DEFAULT_WIDTHS))
SHOWN_LAYERS = 3


class InfeasibleBudget(BitscapeError):
    """No policy keeps every cap; the message and these fields tell what would."""

    def __init__(
        self,
        message: str,
        alone: Mapping[str, float],
        jointly: Mapping[str, float | None],
        layers: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__(message)
        self.alone = dict(alone)
        """Kind of cost -> smallest value any policy has, without the other caps."""
        self.jointly = dict(jointly)
        """Kind -> smallest value while the other caps stay, None if those clash; empty if one cap alone is too low."""
        self.layers = dict(layers)
        """Kind -> the layers with the largest share in `alone`, largest first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """A candidate pair of bits for each group of free layers, under caps; `Choices.of` checks all of it."""

    network: NetworkProfile
    """Costs of the layers; with times where a latency table was given."""
    candidates: tuple[LayerBits, ...]
    """Pairs of bits that some layer may get, in the order of the columns of `allowed`."""
    offered: tuple[LayerBits, ...]
    """Those of them that a layer may get whose activations are free."""
    freedom: FreeLayers
    """Pinned layers and groups of free ones."""
    budget: Budget
    """Absolute caps; without any, every policy fits."""
    target: Target | None = None
    """What the network will run on, to whose bits the candidates are kept."""
    latency: LatencyTable | None = None
    """Where the times in `network` come from."""

    @classmethod
    def of(
        cls,
        network: NetworkProfile,
        budget: Budget | BudgetText,
        *,
        candidates: Sequence[LayerBits] | None = None,
        pinned: Mapping[str, LayerBits | str] | Pins | None = None,
        keep_float: Iterable[str] = (),
        tied: Sequence[Sequence[str]] = (),
        target: Target | None = None,
        latency: LatencyTable | None = None,
        along: str | None = None,
    ) -> "Choices":
        """State what may be chosen.

        Args:
            network: costs of the layers.
            budget: one or several caps, e.g. "bitops=0.25x" or ["bitops=w4a4", "weight_bytes=1.2MB"]; all must hold.
            candidates: pairs of bits that a layer may get; None offers all pairs of 2, 3, 4, 5, 6 and 8 bits, of these
                what the target has.
            pinned: names or patterns of layers with fixed bits; None pins the first layer and the heads, as far as the
                budget asks for it (see `free_layers`), {} pins none.
            keep_float: names or patterns of layers that stay float.
            tied: groups of layers that must get the same bits.
            target: offer only bits that it stores and computes.
            latency: measured times, which make `latency_ms` a cost and a cap.
            along: kind of cost that will be traded against the score without a cap, as for a front.

        Raises:
            BitscapeError: unknown names, contradicting pins, a budget that cannot be read, and pairs of bits that
                the latency table or the target does not have.
        """
        network = _timed(network, latency)
        offered = offered_pairs(candidates, target)
        budget = budget if isinstance(budget, Budget) else lasting(budget)
        kinds = budget.caps.keys() if isinstance(budget, Budget) else budget_kinds(budget, has_latency=network.has_latency)
        freedom = free_layers(
            network,
            [*kinds, *([] if along is None else [along])],
            pinned=pinned,
            keep_float=keep_float,
            tied=tied,
            always=None if target is None else target.pins(network),
        )
        absolute = budget if isinstance(budget, Budget) else parse_budget(budget, network, freedom.pinned, freedom.activations)
        fixed = product(sorted({bits.weight for bits in offered}), sorted(set(freedom.activations.values())))
        choices = cls(
            network=network,
            candidates=tuple(dict.fromkeys([*offered, *(LayerBits(*pair) for pair in fixed)])),
            offered=offered,
            freedom=freedom,
            budget=absolute,
            target=target,
            latency=latency,
        )
        choices._check()
        return choices

    def _check(self) -> None:
        if self.latency is not None:
            offered = {name: self._pairs(name) for name in self.free_layers}
            for layer in self.network.layers:
                for bits in offered.get(layer.name) or [self.freedom.pinned[layer.name]]:
                    layer_latency_ns(layer, bits)  # names the pair that was not measured
        if self.target is not None:
            self.target.check_pinned(self.freedom.pinned, self.network)

    @cached_property
    def allowed(self) -> Allowed:
        """Which candidates each group of free layers may get, (groups, candidates)."""
        pairs = [set(self._pairs(group[0])) for group in self.freedom.groups]
        rows = [[bits in allowed for bits in self.candidates] for allowed in pairs]
        return np.array(rows, dtype=bool).reshape(len(rows), len(self.candidates))

    def _pairs(self, name: str) -> list[LayerBits]:
        """What a free layer may get."""
        if name not in self.freedom.activations:
            return list(self.offered)
        weights = dict.fromkeys(bits.weight for bits in self.offered)
        return [LayerBits(weight, self.freedom.activations[name]) for weight in weights]

    def in_all_pairs(self, candidates: Sequence[LayerBits]) -> "Choices":
        """Return the choices among `candidates`, where each weight width that was offered may go with each activation width."""
        widths = ({bits.weight for bits in self.offered}, {bits.activation for bits in self.offered})
        offered = tuple(bits for bits in candidates if bits.weight in widths[0] and bits.activation in widths[1])
        return replace(self, candidates=tuple(candidates), offered=offered)

    @cached_property
    def caps(self) -> tuple[CapRow, ...]:
        """The budget in exact integers."""
        return tuple(self.row(kind, limit) for kind, limit in self.budget.limits(self.network).items())

    @property
    def free_layers(self) -> tuple[str, ...]:
        """Names of the layers to decide on, in call order."""
        return tuple(name for name in self.network.by_name if name not in self.freedom.pinned)

    def row(self, kind: str, limit: int) -> CapRow:
        """Return what each candidate costs each group, and all others, under a limit on one kind of cost."""
        how, layers = cap(kind), self.network.by_name
        costs = np.empty((len(self.freedom.groups), len(self.candidates)), dtype=object)
        for index, group in enumerate(self.freedom.groups):
            for column, bits in enumerate(self.candidates):
                costs[index, column] = how.combined(layer_cost(kind, layers[name], bits) for name in group)
        pinned = [layer_cost(kind, layers[name], bits) for name, bits in self.freedom.pinned.items()]
        idle = [layer_cost(kind, layer, NO_EFFECT) for layer in self.network.never_called]
        return CapRow(kind, costs, limit, how.combined([0, *pinned, *idle]), additive=how.combine == "sum")

    def policy(self, choice: Choice, provenance: Mapping[str, Any]) -> Policy:
        """Return the policy of a choice, for every layer of the network, with fingerprint and cost."""
        pairs = (self.candidates[index] for index in choice)
        chosen = {name: pair for group, pair in zip(self.freedom.groups, pairs, strict=True) for name in group}
        bits = {**dict.fromkeys(self.network.shapes, NO_EFFECT), **self.freedom.pinned, **chosen}
        cost = policy_cost(self.network, Policy(bits))
        return Policy(bits, fingerprint(self.network.shapes), cost, provenance)

    def holds(self, choice: Choice) -> bool:
        """Tell whether a choice stays within every cap."""
        return all(row.holds(choice) for row in self.caps)

    def uniform(self, column: int) -> Choice:
        """Return the choice of one candidate for every group; of those that may not have it, its weight bits at most activations."""
        pair = self.candidates[column]
        by_activation = sorted(range(len(self.candidates)), key=lambda index: -self.candidates[index].activation)
        alike = [column, *(index for index in by_activation if self.candidates[index].weight == pair.weight)]
        return tuple(next(index for index in alike if row[index]) for row in self.allowed)

    def widest(self) -> dict[str, LayerBits]:
        """Return free layer -> the most bits that its weights and its activations may have."""
        pairs = {name: self._pairs(name) for name in self.free_layers}
        return {
            name: LayerBits(max(bits.weight for bits in own), max(bits.activation for bits in own))
            for name, own in pairs.items()
        }

    @property
    def with_first_free(self) -> "Choices":
        """The same choices, where a cap is on weights alone with the weights of the first layer free, too."""
        return self if self.freedom.with_first is None else replace(self, freedom=self.freedom.with_first)

    def narrowest(self) -> Choice:
        """Return the choice of each group's fewest bits, of weights before activations."""
        ascending = sorted(range(len(self.candidates)), key=lambda column: self.candidates[column])
        return tuple(next(column for column in ascending if row[column]) for row in self.allowed)

    def check_feasible(self) -> None:
        """Raise InfeasibleBudget if no choice keeps every cap; the solver is asked only where the fewest bits do not."""
        if not self.holds(self.narrowest()):
            self.first_feasible()

    def first_feasible(self) -> Choice:
        """Return some choice within all caps. Raises InfeasibleBudget."""
        solution = solve(np.where(self.allowed, 0.0, np.inf), self.caps)
        return self.refuse(self.allowed) if solution is None else solution.choice

    def only_policy(self) -> Policy:
        """Return the policy of a network without free layers. Raises InfeasibleBudget if the pinned bits exceed a cap."""
        return self.policy((), {}) if self.holds(()) else self.refuse(self.allowed)

    def value(self, kind: str, total: int) -> float:
        """Turn an exact total into the unit of the cap, such that a cap of this value allows it."""
        denominator = cap(kind).denominator(self.network)
        return total if denominator == 1 else total / denominator

    def provenance(self) -> dict[str, Any]:
        """Say under which conditions bits were chosen."""
        return {
            "budget": dict(self.budget.caps),
            "pinned": self.freedom.described(),
            **({} if self.latency is None else {"latency": self.latency.source()}),
            **({} if self.target is None else {"target": self.target.name}),
        }

    def refuse(self, allowed: Allowed) -> NoReturn:
        """Raise InfeasibleBudget for these caps, given that no choice keeps them all."""
        alone = {row.name: smallest(row, (), allowed) for row in self.caps}
        layers = {row.name: self._most_costly(row, allowed) for row in self.caps}
        jointly: dict[str, int | None] = {}
        if all((alone[row.name] or 0) <= row.limit for row in self.caps):
            for row in self.caps:
                jointly[row.name] = smallest(row, [other for other in self.caps if other is not row], allowed)
        raise InfeasibleBudget(
            self._refusal(alone, jointly, layers),
            {kind: self.value(kind, total or 0) for kind, total in alone.items()},
            {kind: None if total is None else self.value(kind, total) for kind, total in jointly.items()},
            layers,
        )

    def _most_costly(self, row: CapRow, allowed: Allowed) -> tuple[str, ...]:
        """Name the layers that cost the most even at their cheapest."""
        layers = self.network.by_name
        least = {name: layer_cost(row.name, layers[name], bits) for name, bits in self.freedom.pinned.items()}
        least |= {idle.name: layer_cost(row.name, idle, NO_EFFECT) for idle in self.network.never_called}
        for group, mask in zip(self.freedom.groups, allowed, strict=True):
            pairs = [bits for bits, free in zip(self.candidates, mask, strict=True) if free]
            least |= {name: min(layer_cost(row.name, layers[name], bits) for bits in pairs) for name in group}
        return tuple(sorted(least, key=lambda name: -least[name])[:SHOWN_LAYERS])

    def _with_reason(self, name: str) -> str:
        """The name of a layer, and why the search has no say in its bits."""
        if name in self.network.uncalled:
            return f"{name} (never called)"
        bits = self.freedom.pinned.get(name)
        return name if bits is None else f"{name} ({'float' if bits.is_float else 'pinned'})"

    def _refusal(
        self,
        alone: Mapping[str, int | None],
        jointly: Mapping[str, int | None],
        layers: Mapping[str, tuple[str, ...]],
    ) -> str:
        totals, others = jointly or alone, ""
        if len(self.caps) > 1:
            others = " with the other caps kept" if jointly else " without the other caps"
        parts = []
        for row in self.caps:
            total = totals[row.name]
            value = "no value" if total is None else repr(self.value(row.name, total))
            names = ", ".join(self._with_reason(name) for name in layers[row.name])
            cap = f"{row.name}={self.budget.caps[row.name]!r}"
            parts.append(f"{cap} (feasible from {value}{others}; most of it in {names})")
        together = "; each cap can be met alone, but not all together" if jointly else ""
        steps = ["raise a cap", "offer fewer bits", *self._ways_to_free(layers.values())]
        return (
            f"budget: no policy fits {' and '.join(parts)}{together}; "
            f"{', '.join(steps[:-1])} or {steps[-1]}"
        )

    def _ways_to_free(self, shown: Collection[Iterable[str]]) -> list[str]:
        """Say how the search could have a say in the bits of those layers."""
        fixed = [self.freedom.pinned[name] for name in chain(*shown) if name in self.freedom.pinned]
        ways = []
        if any(not bits.is_float for bits in fixed):
            ways.append("free pinned layers by pinned={} or --pin none")
        if any(bits.is_float for bits in fixed):
            ways.append("keep fewer layers float")
        if not set(self.network.uncalled).isdisjoint(chain(*shown)):
            ways.append("delete the layers that are never called")
        return ways


def _timed(network: NetworkProfile, latency: LatencyTable | None) -> NetworkProfile:
    if latency is None:
        return network
    if not isinstance(latency, LatencyTable):
        raise BitscapeError(f"latency: {latency!r} is no LatencyTable; read the file: LatencyTable.load(path)")
    return with_latency(network, latency)


def offered_pairs(candidates: Iterable[LayerBits] | None, target: Target | None) -> tuple[LayerBits, ...]:
    """Return the pairs of bits that are offered. Raises BitscapeError for pairs that no layer, or not the target, can have."""
    if target is not None and not isinstance(target, Target):
        raise BitscapeError(f'target: {target!r} is no Target; take one of TARGETS, e.g. TARGETS["openvino"]')
    if candidates is None:
        return DEFAULT_CANDIDATES if target is None else tuple(filter(target.allows, DEFAULT_CANDIDATES))
    candidates = tuple(candidates)
    check_candidates(candidates)
    if target is not None:
        target.check("candidates", candidates)
    return candidates
