"""From scores and caps to a policy, exactly: a multiple-choice knapsack over layers.

`Choices` states the problem in integers (what each pair costs each group of layers), `allocate` solves it, `near_best`
lists the best solutions, `pareto_front` solves it along a cost.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitscape.cost.budget import Budget
from bitscape.cost.layers import NO_EFFECT, NetworkProfile
from bitscape.cost.policy_cost import cap, layer_cost, policy_cost
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.progress import track
from bitscape.searches import knapsack
from bitscape.searches.front import Front
from bitscape.searches.knapsack import TIME_LIMIT_S, CapRow, Solution, smallest, solve
from bitscape.searches.problem import FreeLayers, free_layers
from bitscape.searches.programme import Allowed, Choice
from bitscape.searches.scores import ScoreTable
from bitscape.version import __version__

_log = logging.getLogger("bitscape.searches")

SHOWN_LAYERS = 3
EQUAL = 1e-12
"""Scores that differ by less than this share of the largest are equal."""
LITTLE_USED = 0.8
"""Below this share of every cap, a policy leaves much of its budget."""


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
    """What can be chosen: a candidate pair per group of free layers, under caps in exact integers."""

    network: NetworkProfile
    candidates: tuple[LayerBits, ...]
    freedom: FreeLayers
    budget: Budget
    caps: tuple[CapRow, ...]

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

    def everything(self) -> Allowed:
        """Return the mask that allows every candidate to every group."""
        return np.ones((len(self.freedom.groups), len(self.candidates)), dtype=bool)

    def first_feasible(self) -> Choice:
        """Return some choice within all caps. Raises InfeasibleBudget."""
        allowed = self.everything()
        solution = solve(np.zeros(allowed.shape), self.caps)
        return self.refuse(allowed) if solution is None else solution.choice

    def refuse(self, allowed: Allowed) -> NoReturn:
        """Raise InfeasibleBudget for these caps, given that no choice keeps them all."""
        alone = {row.name: smallest(row, (), allowed) for row in self.caps}
        layers = {row.name: _holding_up(row, self, allowed) for row in self.caps}
        jointly: dict[str, int | None] = {}
        if all((alone[row.name] or 0) <= row.limit for row in self.caps):
            for row in self.caps:
                jointly[row.name] = smallest(row, [other for other in self.caps if other is not row], allowed)
        raise InfeasibleBudget(
            _refusal(self, alone, jointly, layers),
            {kind: _value(kind, total or 0, self.network) for kind, total in alone.items()},
            {kind: None if total is None else _value(kind, total, self.network) for kind, total in jointly.items()},
            layers,
        )


def choices(
    network: NetworkProfile,
    budget: Budget,
    candidates: Sequence[LayerBits],
    pinned: Mapping[str, LayerBits] | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> Choices:
    """State the allocation problem; see `allocate` for the arguments."""
    freedom = free_layers(network, pinned, tied)
    limits = budget.limits(network).items()
    rows = tuple(_row(kind, most, network, tuple(candidates), freedom) for kind, most in limits)
    return Choices(network=network, candidates=tuple(candidates), freedom=freedom, budget=budget, caps=rows)


def allocate(
    scores: ScoreTable,
    network: NetworkProfile,
    budget: Budget,
    pinned: Mapping[str, LayerBits] | None = None,
    tied: Sequence[Sequence[str]] = (),
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> Policy:
    """Return the policy with the smallest total score within every cap of the budget.

    It is the best to a relative 1e-9 of the score that the budget costs, and its provenance has "gap" 0. If the time
    ends first, "gap" is the share of that score which a better policy could save at most, and a warning says so. Equal
    scores, costs and budgets give the same policy, also where several are equally good, unless the time ends.

    Args:
        scores: a row for every layer that is not pinned; rows of pinned layers are not used.
        network: costs of the layers.
        budget: caps; every one holds exactly, in integers.
        pinned: fixed layers, which cost too; None pins the first and the last at 8/8.
        tied: groups of layers that share one pair; their scores add up.
        time_limit_s: wall-clock seconds after which the best policy so far is returned, from 0.

    Raises:
        InfeasibleBudget: no policy fits; it tells the smallest budget that does.
        BitscapeError: unknown, missing or contradicting layers; scores that say nothing; no policy was seen within the time.
    """
    return near_best(scores, network, budget, pinned, tied, count=1, time_limit_s=time_limit_s)[0]


def near_best(
    scores: ScoreTable,
    network: NetworkProfile,
    budget: Budget,
    pinned: Mapping[str, LayerBits] | None = None,
    tied: Sequence[Sequence[str]] = (),
    count: int = 8,
    within: float = 0.01,
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Policy]:
    """Return the `count` best policies within every cap of the budget, fewer if fewer fit or score well enough.

    They ascend by total score, the first is that of `allocate`, and no two are alike. Near-equal means a score of at
    most best + within * (best - ideal). The ideal gives each group of layers its best-scored pair, whatever that costs:
    with 0.01 a policy may lose 1 % more score than the budget already costs. Scores may be negative or have any offset. A
    budget that costs no score leaves only policies of equal score.

    Args:
        scores, network, budget, pinned, tied: see `allocate`.
        count: how many policies to return at most, from 1.
        within: the slack, from 0.
        time_limit_s: wall-clock seconds a policy, from 0; see `allocate`.

    Raises:
        InfeasibleBudget: no policy fits; it tells the smallest budget that does.
        BitscapeError: `count` or `within` out of range; unknown, missing or contradicting layers.
    """
    if count < 1:
        raise BitscapeError(f"count={count}: it must be at least 1")
    if not 0 <= within < np.inf:
        raise BitscapeError(f"within={within}: it must be from 0 and finite; 0.01 allows 1 % more score than the budget costs")
    _check_network(scores, network)
    stated = choices(network, budget, scores.candidates, pinned, tied)
    values = _group_scores(scores, stated)
    solutions = knapsack.near_best(values, stated.caps, count, within, time_limit_s=time_limit_s)
    if not solutions:
        stated.refuse(np.isfinite(values))
    _check_say_something(scores, values)
    _warn_if_unused(stated, solutions[0].choice)
    if gap := solutions[0].gap:
        _log.warning("allocation: stopped after %g s; %s", time_limit_s, gap_note(gap))
    return [stated.policy(solution.choice, _provenance(scores, values, solution, budget)) for solution in solutions]


def gap_note(gap: float) -> str:
    """Say what a gap means."""
    return f"a better policy could save at most {gap:.2%} of the score that the budget costs"


def only_choice(
    network: NetworkProfile,
    budget: Budget,
    candidates: Sequence[LayerBits],
    pinned: Mapping[str, LayerBits] | None,
    tied: Sequence[Sequence[str]],
) -> Policy:
    """Return the policy of a network without free layers. Raises InfeasibleBudget if the pinned bits exceed a cap."""
    stated = choices(network, budget, candidates, pinned, tied)
    return stated.policy((), {}) if stated.holds(()) else stated.refuse(stated.everything())


def pareto_front(
    scores: ScoreTable,
    network: NetworkProfile,
    pinned: Mapping[str, LayerBits] | None = None,
    cost: str = "bitops",
    points: int = 20,
    *,
    tied: Sequence[Sequence[str]] = (),
) -> Front:
    """Return policies from the cheapest possible to the best-scored, each the best for its cost, by ascending `cost`.

    Caps are spaced evenly in the logarithm; fewer than `points` policies come back when several have the same optimum.
    """
    if points < 2:
        raise BitscapeError(f"points={points}: a front needs at least 2")
    _check_network(scores, network)
    everything = Budget({cost: _largest(cost, scores, network, pinned, tied)})
    stated = choices(network, everything, scores.candidates, pinned, tied)
    values, row = _group_scores(scores, stated), stated.caps[0]
    _check_say_something(scores, values)
    best = solve(values, [row])
    least = smallest(row, (), np.isfinite(values))
    assert best is not None and least is not None, "the cap is the cost of the largest policy"
    most = row.total(best.choice)
    caps = np.geomspace(max(least, 1), max(most, 1), points).astype(np.int64).tolist()
    limits = sorted({least, *caps[1:-1], most})
    solved = (solve(values, [replace(row, limit=limit)]) for limit in track(limits, label="front: budget"))
    best_at = _undominated([solution for solution in solved if solution is not None], row)
    told = ((s.choice, _provenance(scores, values, s, _at_cost(row, s.choice, network))) for s in best_at)
    return Front(kind=cost, method=scores.method, policies=tuple(stated.policy(*each) for each in told))


def _check_network(scores: ScoreTable, network: NetworkProfile) -> None:
    """Raise BitscapeError if the scores are of another network; the names are told first, they say more."""
    _check_layers(scores, network)
    if scores.fingerprint not in (None, own := fingerprint(network.shapes)):
        raise BitscapeError(
            f"scores: they are of a network with fingerprint {scores.fingerprint}, and this one has {own}: "
            "layer names or shapes differ; score this network"
        )


def _row(kind: str, limit: int, network: NetworkProfile, candidates: tuple[LayerBits, ...], freedom: FreeLayers) -> CapRow:
    how = cap(kind)
    costs = np.empty((len(freedom.groups), len(candidates)), dtype=object)
    for at, group in enumerate(freedom.groups):
        for column, bits in enumerate(candidates):
            costs[at, column] = how.combined(layer_cost(kind, network.by_name[name], bits) for name in group)
    pinned = [layer_cost(kind, network.by_name[name], bits) for name, bits in freedom.pinned.items()]
    idle = [layer_cost(kind, layer, NO_EFFECT) for layer in network.never_called]
    fixed = how.combined([0, *pinned, *idle])
    return CapRow(kind, costs, limit, fixed, additive=how.combine == "sum")


def _check_layers(scores: ScoreTable, network: NetworkProfile) -> None:
    for name in scores.layers:
        if name not in network.by_name:
            raise BitscapeError(f"scores: the network has no layer {name!r}{nearest(name, network.by_name)}")


def _group_scores(scores: ScoreTable, stated: Choices) -> NDArray[np.float64]:
    """Add up the rows of each group of tied layers. A group without a common allowed pair is an error."""
    row_of = {name: row for row, name in enumerate(scores.layers)}
    totals = np.zeros((len(stated.freedom.groups), len(scores.candidates)))
    for at, group in enumerate(stated.freedom.groups):
        for name in group:
            if name not in row_of:
                raise BitscapeError(f"scores: layer {name!r} has no row{nearest(name, row_of)}; score it, or pin it")
            totals[at] += scores.values[row_of[name]]
        if not np.isfinite(totals[at]).any():
            raise BitscapeError(f"scores: tied layers {', '.join(group)} have no pair that all of them may take; untie them")
    return totals


def _check_say_something(scores: ScoreTable, values: NDArray[np.float64]) -> None:
    """Raise BitscapeError if no group's pairs differ in score: any policy would be as good."""
    finite = np.where(np.isfinite(values), values, np.nan)
    ranges = np.nanmax(finite, axis=1, initial=-np.inf) - np.nanmin(finite, axis=1, initial=np.inf)
    if values.shape[1] > 1 and len(values) and bool((ranges <= EQUAL * np.nanmax(np.abs(finite))).all()):
        raise BitscapeError(
            f"scores: method {scores.method} gives every pair of bits of a layer the same score (such as "
            f"{np.nanmax(finite):g}), so that no policy is better than another; use method local, or check --task and the images"
        )


def _warn_if_unused(stated: Choices, choice: Choice) -> None:
    """Say so if much of every cap is left while a layer could take more bits within all of them."""
    used = max((row.total(choice) / max(row.limit, 1) for row in stated.caps), default=1.0)
    if used >= LITTLE_USED:
        return
    pairs = stated.candidates
    for group, column in enumerate(choice):
        for wider, pair in enumerate(pairs):
            more = pair != pairs[column] and pair.weight >= pairs[column].weight and pair.activation >= pairs[column].activation
            if more and stated.holds((*choice[:group], wider, *choice[group + 1 :])):
                _log.warning(
                    "budget: the policy uses at most %.0f %% of each cap although layers could take more bits (%s has %s, %s fits): "
                    "the scores see no gain in them",
                    *(100 * used, stated.freedom.groups[group][0], pairs[column], pair),
                )
                return


def _provenance(scores: ScoreTable, values: NDArray[np.float64], solution: Solution, budget: Budget) -> dict[str, Any]:
    total = float(values[np.arange(len(values)), list(solution.choice)].sum())
    budgets = dict(budget.caps)
    return {"method": scores.method, "score": total, "gap": solution.gap, "budget": budgets, "version": __version__}


def _value(kind: str, total: int, network: NetworkProfile) -> float:
    """Turn an exact total into the unit of the cap, such that a cap of this value allows it."""
    denominator = cap(kind).denominator(network)
    return total if denominator == 1 else total / denominator


def _at_cost(row: CapRow, choice: Choice, network: NetworkProfile) -> Budget:
    return Budget({row.name: _value(row.name, row.total(choice), network)})


def _largest(
    kind: str,
    scores: ScoreTable,
    network: NetworkProfile,
    pinned: Mapping[str, LayerBits] | None,
    tied: Sequence[Sequence[str]],
) -> float:
    row = _row(kind, 0, network, scores.candidates, free_layers(network, pinned, tied))
    return _value(kind, row.total(tuple(int(i) for i in row.costs.argmax(axis=1))), network)


def _undominated(solutions: Sequence[Solution], row: CapRow) -> list[Solution]:
    """Keep, by ascending cost, each solution that scores better than all cheaper ones."""
    front: list[Solution] = []
    best = np.inf
    for solution in sorted(solutions, key=lambda solution: row.total(solution.choice)):
        if solution.regret < best:
            best = solution.regret
            front.append(solution)
    return front


def _holding_up(row: CapRow, stated: Choices, allowed: Allowed) -> tuple[str, ...]:
    """Name the layers that cost the most even at their cheapest."""
    layers = stated.network.by_name
    least = {name: layer_cost(row.name, layers[name], bits) for name, bits in stated.freedom.pinned.items()}
    for group, mask in zip(stated.freedom.groups, allowed, strict=True):
        pairs = [bits for bits, free in zip(stated.candidates, mask, strict=True) if free]
        least |= {name: min(layer_cost(row.name, layers[name], bits) for bits in pairs) for name in group}
    return tuple(sorted(least, key=lambda name: -least[name])[:SHOWN_LAYERS])


def _refusal(
    stated: Choices,
    alone: Mapping[str, int | None],
    jointly: Mapping[str, int | None],
    layers: Mapping[str, tuple[str, ...]],
) -> str:
    totals = jointly or alone
    parts = []
    for row in stated.caps:
        total = totals[row.name]
        value = "no value" if total is None else repr(_value(row.name, total, stated.network))
        names = ", ".join(f"{name} (pinned)" if name in stated.freedom.pinned else name for name in layers[row.name])
        parts.append(f"{row.name}={stated.budget.caps[row.name]!r} (feasible from {value}; most of it in {names})")
    given = "with the other caps kept: each can be met alone but not together" if jointly else "without the other caps"
    return (
        f"budget: no policy fits {'; '.join(parts)}; the smallest feasible values are {given}; "
        "raise a cap, offer fewer bits or unpin layers"
    )
