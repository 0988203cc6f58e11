"""The multiple-choice knapsack behind the allocation: one candidate per group, least total score, every cap held.

Costs are Python integers, scores are floats. The linear relaxation prices the caps; with these prices most candidates cost more
than the gap between the bound and a choice already known, so that no better choice can hold them. HiGHS finds the best
choice of the rest, exact integers decide whether it is allowed, and a choice over a cap is cut off.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError
from bitscape.searches.programme import Allowed, Choice, Outcome, Row, Scores, integer, relaxed, row_of, ticking

_log = logging.getLogger("bitscape.searches")

TOLERANCE = 1e-9
"""Relative error of totals that counts as none."""
SMALL = 200
"""Up to so many candidates are solved at once."""
FIRST_CORE = 3
"""Candidates a group, on average, of the first attempt."""
RESCALINGS = 30
TIME_LIMIT_S = 120.0


class UndecidedError(BitscapeError):
    """The time ended before any choice within the caps was seen."""


@dataclass(frozen=True, eq=False)
class CapRow:
    """One limit on the cost of a choice of one candidate per group."""

    name: str
    """What is limited, e.g. "bitops"."""
    costs: NDArray[np.object_]
    """Python integers, shape (groups, candidates)."""
    limit: int
    """Largest allowed total."""
    fixed: int = 0
    """Cost of what is not chosen (the pinned layers)."""
    additive: bool = True
    """Totals are sums; otherwise the largest cost of any group counts."""

    def total(self, choice: Choice) -> int:
        """Return the exact cost of a choice."""
        chosen = [int(row[index]) for row, index in zip(self.costs, choice, strict=True)]
        return self.fixed + sum(chosen) if self.additive else max([self.fixed, *chosen])

    def holds(self, choice: Choice) -> bool:
        """Tell whether a choice stays within the limit."""
        return self.total(choice) <= self.limit


@dataclass(frozen=True)
class Solution:
    """A choice within all caps, and how good it is known to be."""

    choice: Choice
    regret: float
    """Its total score above the ideal, which gives each group its smallest score whatever it costs."""
    bound: float
    """No choice has less; at most `regret`."""

    @property
    def gap(self) -> float:
        """Share of the regret that a better choice could save at most; 0 for a proven optimum."""
        return 0.0 if self.bound >= self.regret * (1 - TOLERANCE) else 1 - max(self.bound, 0.0) / self.regret


def solve(
    scores: Scores, caps: Sequence[CapRow], *, excluded: Sequence[Choice] = (), time_limit_s: float = TIME_LIMIT_S
) -> Solution | None:
    """Return the candidate of each group with the smallest total score under all caps, or None when there is none.

    `scores` has shape (groups, candidates); infinity forbids a candidate. The regret is the smallest to a relative 1e-9
    among the choices that are not `excluded`, unless `time_limit_s` (wall clock) ended the search: the solution then has
    a gap. Equal input gives equal output, where the time suffices.

    Raises:
        UndecidedError: no choice within the caps was seen within the time.
    """
    allowed = reachable(np.isfinite(scores), caps)
    if allowed is None:
        return None
    if not len(scores):
        return None if excluded else Solution((), 0.0, 0.0)
    with ticking("allocation", time_limit_s):
        return _Search(scores, caps, [_only(choice, scores.shape) for choice in excluded], time_limit_s).best(allowed)


class _Search:
    """One solve: the caps as rows, choices cut off so far, and the time left."""

    def __init__(self, scores: Scores, caps: Sequence[CapRow], cuts: list[Allowed], time_limit_s: float) -> None:
        self.regret = scores - np.where(np.isfinite(scores), scores, np.inf).min(axis=1, keepdims=True)
        self.caps = [cap for cap in caps if cap.additive]
        self.cuts = cuts
        self.deadline = time.monotonic() + time_limit_s
        self.known: Choice | None = None
        """The best choice so far that keeps every cap."""

    def best(self, allowed: Allowed) -> Solution | None:
        """Solve; then again without what a better choice cannot hold, until HiGHS sees the total exactly enough."""
        solution, bound = None, 0.0
        for _ in range(RESCALINGS):
            outcome = self._over(allowed)
            bound = max(bound, outcome.bound)
            if outcome.choice is None:
                break
            total = _at(self.regret, outcome.choice)
            solution = Solution(outcome.choice, total, min(bound, total))
            if total == 0.0 or outcome.error <= TOLERANCE * total or self._late():
                break
            # Regrets are never negative, so no optimum holds a candidate with a larger one than this total.
            allowed = allowed & (self.regret <= total)
        return solution

    def _over(self, allowed: Allowed) -> Outcome:
        """Solve over the candidates that the relaxation favors, then over all that could be in a better choice."""
        objective = np.where(allowed, self.regret, 0.0)
        rows = [row_of(_counted_from_cheapest(cap.costs, allowed), _room(cap, allowed), allowed) for cap in self.caps]
        if np.count_nonzero(allowed) <= SMALL:
            return self._exact(objective, allowed, rows)
        relaxation = relaxed(objective, allowed, [*rows, *map(_cut_row, self.cuts)])
        if relaxation is None:
            return Outcome(None, math.inf)
        width = float(np.sort(relaxation.excess[allowed])[: FIRST_CORE * len(allowed)].max())
        while True:
            core = allowed & (relaxation.excess <= width)
            outcome = self._exact(objective, core, rows)
            outside = math.inf if (core == allowed).all() else relaxation.least + width
            total = math.inf if outcome.choice is None else _at(objective, outcome.choice)
            if outside == math.inf or total <= outside or self._late():
                return replace(outcome, bound=max(relaxation.least, min(outcome.bound, outside)))
            width = 4 * width + float(objective.max()) / 1e3 if outcome.choice is None else (total - relaxation.least) * (1 + TOLERANCE)

    def _exact(self, objective: Scores, core: Allowed, rows: Sequence[Row]) -> Outcome:
        """Solve; cut off and solve again while the answer breaks a cap in exact integers.

        Returns the best choice known, also where the time ends before another one is seen.
        """
        while True:
            left = self.deadline - time.monotonic()
            outcome = integer(objective, core, [*rows, *map(_cut_row, self.cuts)], max(left, 0.1))
            if outcome.choice is not None:
                broken = [cap for cap in self.caps if not cap.holds(outcome.choice)]
                if not broken:
                    self._note(outcome.choice)
                    break
                self.cuts.extend(_cut(cap, outcome.choice) for cap in broken)
            if left <= 0 or (outcome.choice is None and math.isfinite(outcome.bound)):
                break
            if outcome.choice is None:
                return outcome
        if self.known is None:
            raise _undecided(self.caps)
        return replace(outcome, choice=self.known)

    def _note(self, choice: Choice) -> None:
        if self.known is None or _at(self.regret, choice) <= _at(self.regret, self.known):
            self.known = choice

    def _late(self) -> bool:
        return time.monotonic() >= self.deadline


def near_best(
    scores: Scores, caps: Sequence[CapRow], count: int, within: float, *, time_limit_s: float = TIME_LIMIT_S
) -> list[Solution]:
    """Return up to `count` different choices under all caps, the best first, by ascending total score.

    None is missing that scores better than the last, and none scores above best + within * (best - ideal). The ideal
    takes each group's smallest score and no cap, so that (best - ideal) is what the caps cost: it is not negative, and
    unlike the total it does not change with the offset of the scores. Where the best is the ideal, only its equals
    come back. Totals are exact to a relative 1e-9 of the same difference, where the time suffices; see `solve`. When
    no further choice was seen within the time, a warning says how many are known.
    """
    first = solve(scores, caps, time_limit_s=time_limit_s)
    if first is None:
        return []
    regret = scores - scores.min(axis=1, keepdims=True, initial=np.inf)
    most = first.regret * (1 + within + TOLERANCE)
    # Regrets are never negative, so no choice within the slack holds a candidate with a larger one.
    scores = np.where(regret <= most, scores, np.inf)
    others: list[Solution] = []
    while len(others) < count - 1:
        solution = _next(scores, caps, [first, *others], time_limit_s)
        if solution is None or solution.regret > most:
            break
        others.append(solution)
    return [first, *sorted(others, key=lambda solution: solution.regret)]


def _next(scores: Scores, caps: Sequence[CapRow], solutions: Sequence[Solution], time_limit_s: float) -> Solution | None:
    try:
        return solve(scores, caps, excluded=[solution.choice for solution in solutions], time_limit_s=time_limit_s)
    except UndecidedError as error:
        _log.warning("only %d near-best choices are known (%s)", len(solutions), error)
        return None


def smallest(cap: CapRow, others: Sequence[CapRow], allowed: Allowed) -> int | None:
    """Return the least total of `cap` that a choice reaches while the `others` hold, None when they cannot all hold."""
    if not cap.additive:
        return _smallest_peak(cap, others, allowed)
    counted = _counted_from_cheapest(cap.costs, allowed).astype(np.float64)
    solution = solve(np.where(allowed, counted, np.inf), others)
    return None if solution is None else cap.total(solution.choice)


def reachable(allowed: Allowed, caps: Sequence[CapRow]) -> Allowed | None:
    """Forbid, until nothing changes, each candidate that breaks a cap even beside the cheapest of the other groups.

    Return None if a group is left without any.
    """
    for cap in caps:
        if not cap.additive:
            allowed = allowed & (cap.costs <= cap.limit).astype(bool)
            if cap.fixed > cap.limit:
                return None
    sums = [cap for cap in caps if cap.additive]
    while allowed.any(axis=1).all():
        if any(_room(cap, allowed) < 0 for cap in sums):
            return None
        fits = ((_counted_from_cheapest(cap.costs, allowed) <= _room(cap, allowed)).astype(bool) for cap in sums)
        fewer = reduce(np.logical_and, fits, allowed)
        if (fewer == allowed).all():
            return allowed
        allowed = fewer
    return None


def _smallest_peak(cap: CapRow, others: Sequence[CapRow], allowed: Allowed) -> int | None:
    levels = sorted({cap.fixed, *(int(cost) for cost in cap.costs[allowed] if cost > cap.fixed)})
    flat = np.where(allowed, 0.0, np.inf)

    def feasible(level: int) -> bool:
        at_level = CapRow(cap.name, cap.costs, level, cap.fixed, additive=False)
        return solve(flat, [*others, at_level]) is not None

    if not feasible(levels[-1]):
        return None
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(levels[middle]) else (middle + 1, high)
    return levels[high]


def _cheapest(costs: NDArray[np.object_], allowed: Allowed) -> list[int]:
    return [min(int(cost) for cost in row[mask]) for row, mask in zip(costs, allowed, strict=True)]


def _counted_from_cheapest(costs: NDArray[np.object_], allowed: Allowed) -> NDArray[np.object_]:
    cheapest = np.array(_cheapest(costs, allowed), dtype=object)
    counted: NDArray[np.object_] = costs - cheapest[:, None]
    return counted


def _room(cap: CapRow, allowed: Allowed) -> int:
    """Return what the limit leaves once each group takes its cheapest candidate."""
    return cap.limit - cap.fixed - sum(_cheapest(cap.costs, allowed))


def _at(values: Scores, choice: Choice) -> float:
    return float(values[np.arange(len(choice)), list(choice)].sum())


def _undecided(sums: Sequence[CapRow]) -> UndecidedError:
    names = ", ".join(cap.name for cap in sums)
    return UndecidedError(f"budget: the time ended before a policy within {names} was seen; change a cap by one part in a million")


def _cut(cap: CapRow, choice: Choice) -> Allowed:
    """Mark, given a choice over the cap, candidates of which one in every group breaks the cap.

    These are the candidates from some cost per group upwards: the cost of the chosen one, lowered as far as the sum of
    all stays over the cap, so that one cut removes as many choices as it can.
    """
    over = cap.total(choice) - cap.limit
    marked = np.zeros(cap.costs.shape, dtype=bool)
    for group, (costs, index) in enumerate(zip(cap.costs, choice, strict=True)):
        level = min(int(cost) for cost in costs if cost > costs[index] - over)
        over -= int(costs[index]) - min(level, int(costs[index]))
        marked[group] = (costs >= level).astype(bool)
    return marked


def _only(choice: Choice, shape: tuple[int, ...]) -> Allowed:
    """Mark the chosen candidates alone: a cut that forbids this one choice."""
    marked = np.zeros(shape, dtype=bool)
    marked[np.arange(len(choice)), list(choice)] = True
    return marked


def _cut_row(cut: Allowed) -> Row:
    return Row(cut.astype(np.float64), len(cut) - 1.0)
