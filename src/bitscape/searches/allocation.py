"""From scores and caps to a policy, exactly: a multiple-choice knapsack over layers.

`allocate` solves it, `near_best` lists the best solutions, `pareto_front` solves it along a cost; `Choices` states it.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.cost.budget import Budget
from bitscape.cost.layers import NetworkProfile
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import Policy, fingerprint
from bitscape.progress import track
from bitscape.searches import knapsack
from bitscape.searches.choices import Choices
from bitscape.searches.front import Front
from bitscape.searches.knapsack import TIME_LIMIT_S, CapRow, Solution, smallest, solve
from bitscape.searches.programme import Choice
from bitscape.searches.scores import ScoreTable
from bitscape.version import __version__

_log = logging.getLogger("bitscape.searches")

EQUAL = 1e-12
"""Scores that differ by less than this share of the largest are equal."""
LITTLE_USED = 0.8
"""Below this share of every cap, a policy leaves much of its budget."""


def allocate(scores: ScoreTable, choices: Choices, *, time_limit_s: float = TIME_LIMIT_S) -> Policy:
    """Return the policy with the smallest total score within every cap of the budget.

    It is the best to a relative 1e-9 of the score that the budget costs, and its provenance has "gap" 0. If the time
    ends first, "gap" is the share of that score which a better policy could save at most, and a warning says so. Equal
    scores, costs and budgets give the same policy, also where several are equally good, unless the time ends.

    Args:
        scores: a row for every layer that is not pinned; rows of pinned layers are not used. Scores of tied layers add up.
        choices: what may be chosen; every cap holds exactly, in integers.
        time_limit_s: wall-clock seconds after which the best policy so far is returned, from 0.

    Raises:
        InfeasibleBudget: no policy fits; it tells the smallest budget that does.
        BitscapeError: scores of another network, missing layers, scores that say nothing; no policy was seen within the time.
    """
    return near_best(scores, choices, count=1, time_limit_s=time_limit_s)[0]


def near_best(
    scores: ScoreTable,
    choices: Choices,
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
        scores, choices: see `allocate`.
        count: how many policies to return at most, from 1.
        within: the slack, from 0.
        time_limit_s: wall-clock seconds a policy, from 0; see `allocate`.

    Raises:
        InfeasibleBudget: no policy fits; it tells the smallest budget that does.
        BitscapeError: `count` or `within` out of range; scores of another network, or missing layers.
    """
    if count < 1:
        raise BitscapeError(f"count={count}: it must be at least 1")
    if not 0 <= within < np.inf:
        raise BitscapeError(f"within={within}: it must be from 0 and finite; 0.01 allows 1 % more score than the budget costs")
    _check_network(scores, choices.network)
    values = group_scores(scores, choices)
    solutions = knapsack.near_best(values, choices.caps, count, within, time_limit_s=time_limit_s)
    if not solutions:
        choices.refuse(np.isfinite(values))
    _check_say_something(scores, values)
    _warn_if_unused(choices, values, solutions[0].choice)
    if gap := solutions[0].gap:
        _log.warning("allocation: stopped after %g s; %s", time_limit_s, gap_note(gap))
    return [choices.policy(solution.choice, _provenance(scores, values, solution, choices.budget)) for solution in solutions]


def gap_note(gap: float) -> str:
    """Say what a gap means."""
    return f"a better policy could save at most {gap:.2%} of the score that the budget costs"


def pareto_front(scores: ScoreTable, choices: Choices, cost: str = "bitops", points: int = 20) -> Front:
    """Return policies from the cheapest possible to the best-scored, each the best for its cost, by ascending `cost`.

    Caps are spaced evenly in the logarithm; fewer than `points` policies come back when several have the same optimum.
    All of them keep the budget's caps on other costs. Raises InfeasibleBudget if no policy does.
    """
    if points < 2:
        raise BitscapeError(f"points={points}: a front needs at least 2")
    _check_network(scores, choices.network)
    others = [row for row in choices.caps if row.name != cost]
    values, row = group_scores(scores, choices), choices.row(cost, 0)
    row = replace(row, limit=row.total(tuple(int(index) for index in row.costs.argmax(axis=1))))
    _check_say_something(scores, values)
    best = solve(values, [*others, row])
    least = smallest(row, others, np.isfinite(values))
    if best is None or least is None:
        choices.refuse(np.isfinite(values))
    most = row.total(best.choice)
    caps = np.geomspace(max(least, 1), max(most, 1), points).astype(np.int64).tolist()
    limits = sorted({least, *caps[1:-1], most})
    solved = (solve(values, [*others, replace(row, limit=limit)]) for limit in track(limits, label="front: budget"))
    best_at = _undominated([solution for solution in solved if solution is not None], row)
    told = ((s.choice, _provenance(scores, values, s, _at_cost(row, s.choice, choices))) for s in best_at)
    return Front(kind=cost, method=scores.method, policies=tuple(choices.policy(*each) for each in told))


def _check_network(scores: ScoreTable, network: NetworkProfile) -> None:
    """Raise BitscapeError if the scores are of another network; the names are told first, they say more."""
    _check_layers(scores, network)
    if scores.fingerprint not in (None, own := fingerprint(network.shapes)):
        raise BitscapeError(
            f"scores: they are of a network with fingerprint {scores.fingerprint}, and this one has {own}: "
            "layer names or shapes differ; score this network"
        )


def _check_layers(scores: ScoreTable, network: NetworkProfile) -> None:
    for name in scores.layers:
        if name not in network.by_name:
            raise BitscapeError(f"scores: the network has no layer {name!r}{nearest(name, network.by_name)}")


def group_scores(scores: ScoreTable, choices: Choices) -> NDArray[np.float64]:
    """Add up the rows of each group of tied layers, (groups, candidates); infinite where a pair is not allowed.

    Raises BitscapeError for layers without scores, and for a group without a pair that all of its layers may take.
    """
    row_of = {name: row for row, name in enumerate(scores.layers)}
    column_of = {pair: column for column, pair in enumerate(scores.candidates)}
    scored = np.column_stack([scores.values, np.full(len(scores.layers), np.inf)])
    columns = [column_of.get(pair, -1) for pair in choices.candidates]  # the last one: a pair that was not scored
    totals = np.where(choices.allowed, 0.0, np.inf)
    for index, group in enumerate(choices.freedom.groups):
        for name in group:
            if name not in row_of:
                raise BitscapeError(f"scores: layer {name!r} has no row{nearest(name, row_of)}; score it, or pin it")
            totals[index] += scored[row_of[name], columns]
        if not np.isfinite(totals[index]).any():
            raise BitscapeError(f"scores: layers {', '.join(group)} have no pair of bits that was offered and scored for all of them")
    return totals


def _check_say_something(scores: ScoreTable, values: NDArray[np.float64]) -> None:
    """Raise BitscapeError if no group's pairs differ in score: any policy would be as good."""
    values = values[np.isfinite(values).sum(axis=1) > 1]  # groups with a choice
    finite = np.where(np.isfinite(values), values, np.nan)
    ranges = np.nanmax(finite, axis=1, initial=-np.inf) - np.nanmin(finite, axis=1, initial=np.inf)
    if values.shape[1] > 1 and len(values) and bool((ranges <= EQUAL * np.nanmax(np.abs(finite))).all()):
        raise BitscapeError(
            f"scores: method {scores.method} gives every pair of bits of a layer the same score (such as "
            f"{np.nanmax(finite):g}), so that no policy is better than another; use method local, or check --task and the images"
        )


def _warn_if_unused(choices: Choices, values: NDArray[np.float64], choice: Choice) -> None:
    """Say so if much of every cap is left while a layer could take more bits within all of them."""
    used = max((row.total(choice) / max(row.limit, 1) for row in choices.caps), default=1.0)
    if used >= LITTLE_USED:
        return
    pairs = choices.candidates
    for group, column in enumerate(choice):
        for wider in np.flatnonzero(np.isfinite(values[group])).tolist():
            pair = pairs[wider]
            more = pair != pairs[column] and pair.weight >= pairs[column].weight and pair.activation >= pairs[column].activation
            if more and choices.holds((*choice[:group], wider, *choice[group + 1 :])):
                _log.warning(
                    "budget: the policy uses at most %.0f %% of each cap although layers could take more bits (%s has %s, %s fits): "
                    "the scores see no gain in them",
                    *(100 * used, choices.freedom.groups[group][0], pairs[column], pair),
                )
                return


def _provenance(scores: ScoreTable, values: NDArray[np.float64], solution: Solution, budget: Budget) -> dict[str, Any]:
    total = float(values[np.arange(len(values)), list(solution.choice)].sum())
    budgets = dict(budget.caps)
    return {"method": scores.method, "score": total, "gap": solution.gap, "budget": budgets, "version": __version__}


def _at_cost(row: CapRow, choice: Choice, choices: Choices) -> Budget:
    return Budget({**choices.budget.caps, row.name: choices.value(row.name, row.total(choice))})


def _undominated(solutions: Sequence[Solution], row: CapRow) -> list[Solution]:
    """Keep, by ascending cost, each solution that scores better than all cheaper ones."""
    front: list[Solution] = []
    best = np.inf
    for solution in sorted(solutions, key=lambda solution: row.total(solution.choice)):
        if solution.regret < best:
            best = solution.regret
            front.append(solution)
    return front
