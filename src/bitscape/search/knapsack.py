"""The multiple-choice knapsack behind the allocation: one candidate per group, least total score, every cap held.

Costs are Python integers, scores are floats. HiGHS (scipy's `milp`) finds the choice; exact integers decide whether it
is allowed. Its tolerances are kept harmless in three ways: costs count from each group's cheapest candidate, so that a
tolerance is relative to what can still be chosen; the objective is scaled until its absolute gap is below 1e-9 of the
optimum; a choice over a cap is cut off.
"""

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from bitscape.errors import BitscapeError

_log = logging.getLogger("bitscape.search")

Allowed = NDArray[np.bool_]
Scores = NDArray[np.float64]
Choice = tuple[int, ...]

SCALE = 1e4  # the largest score difference handed to HiGHS, whose absolute gap is 1e-6
CUTS_PER_LIMIT = 40
TIGHTENINGS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)
RESCALINGS = 30


class UndecidedError(BitscapeError):
    """Too many choices exceed a cap by less than the solver can tell."""


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


def solve(scores: Scores, caps: Sequence[CapRow], *, excluded: Sequence[Choice] = (), time_limit_s: float = 300.0) -> Choice | None:
    """Return the candidate of each group with the smallest total score under all caps, or None when there is none.

    `scores` has shape (groups, candidates); infinity forbids a candidate. The total is optimal to a relative 1e-9 among
    the choices that are not `excluded`.
    A warning is logged where that is not proven: after `time_limit_s` per integer programme, or when choices that
    exceed a cap by less than one part in a million outnumber the cuts. Equal input gives equal output.
    """
    allowed = reachable(np.isfinite(scores), caps)
    if allowed is None:
        return None
    sums = [cap for cap in caps if cap.additive]
    cuts = [_only(choice, scores.shape) for choice in excluded]
    regret = scores - np.where(allowed, scores, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    choice: Choice | None = None
    for _ in range(RESCALINGS):
        largest = float(np.where(allowed, regret, 0.0).max(initial=0.0))
        scaled = np.where(allowed, regret, 0.0) / (largest or 1.0) * SCALE
        choice = _solve_scaled(scaled, allowed, sums, cuts, time_limit_s)
        if choice is None:
            return None
        total = _at(regret, choice)
        if total >= largest / 10:
            return choice
        # Regrets are never negative, so no optimum holds a candidate with a larger one than this total.
        allowed = allowed & (regret <= total)
    return choice


def near_best(scores: Scores, caps: Sequence[CapRow], count: int, within: float) -> list[Choice]:
    """Return up to `count` different choices under all caps, the best first, by ascending total score.

    None is missing that scores better than the last, and none scores above best + within * (best - ideal). The ideal
    takes each group's smallest score and no cap, so that (best - ideal) is what the caps cost: it is not negative, and
    unlike the total it does not change with the offset of the scores. Where the best is the ideal, only its equals
    come back. Totals are exact to a relative 1e-9 of the same difference; see `solve`. A warning is logged where the
    list may be incomplete.
    """
    first = solve(scores, caps)
    if first is None:
        return []
    regret = scores - scores.min(axis=1, keepdims=True, initial=np.inf)
    most = _at(regret, first) * (1 + within + 1e-9)
    # Regrets are never negative, so no choice within the slack holds a candidate with a larger one.
    scores = np.where(regret <= most, scores, np.inf)
    others: list[Choice] = []
    while len(others) < count - 1:
        choice = _next(scores, caps, [first, *others])
        if choice is None or _at(regret, choice) > most:
            break
        others.append(choice)
    return [first, *sorted(others, key=lambda choice: _at(regret, choice))]


def _next(scores: Scores, caps: Sequence[CapRow], found: Sequence[Choice]) -> Choice | None:
    try:
        return solve(scores, caps, excluded=found)
    except UndecidedError as error:
        _log.warning("only %d near-best choices are known (%s)", len(found), error)
        return None


def smallest(cap: CapRow, others: Sequence[CapRow], allowed: Allowed) -> int | None:
    """Return the least total of `cap` that a choice reaches while the `others` hold, None when they cannot all hold."""
    if not cap.additive:
        return _smallest_peak(cap, others, allowed)
    counted = _counted_from_cheapest(cap.costs, allowed).astype(np.float64)
    choice = solve(np.where(allowed, counted, np.inf), others)
    return None if choice is None else cap.total(choice)


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


def _solve_scaled(objective: Scores, allowed: Allowed, sums: Sequence[CapRow], cuts: list[Allowed], time_limit_s: float) -> Choice | None:
    """Solve; cut off and solve again while the answer breaks a cap; after too many cuts, aim just below the caps."""
    for tightening in TIGHTENINGS:
        if tightening > 0.0:
            _log.warning("solving for caps tightened by a relative %g: the choice may not be the best one", tightening)
        rows = [_row(cap, allowed, tightening) for cap in sums]
        for _ in range(CUTS_PER_LIMIT):
            choice = _milp(objective, allowed, [*rows, *(_cut_row(cut, allowed) for cut in cuts)], time_limit_s)
            if choice is None and tightening == 0.0:
                return None
            if choice is None:
                raise _undecided(sums)
            broken = [cap for cap in sums if not cap.holds(choice)]
            if not broken:
                return choice
            cuts.extend(_cut(cap, choice) for cap in broken)
    raise _undecided(sums)


def _undecided(sums: Sequence[CapRow]) -> UndecidedError:
    names = ", ".join(cap.name for cap in sums)
    return UndecidedError(f"budget: the solver cannot tell what fits exactly under {names}; change a cap by one part in a million")


def _row(cap: CapRow, allowed: Allowed, tightening: float) -> tuple[Scores, float]:
    """Return (coefficients per allowed candidate, right side), with coefficients from 0 to 1."""
    counted = np.where(allowed, _counted_from_cheapest(cap.costs, allowed), 0)
    largest = max(1, *(int(cost) for cost in counted.flat)) if counted.size else 1
    right = _room(cap, allowed) - tightening * max(abs(cap.limit), 1)
    return (counted[allowed] / largest).astype(np.float64), right / largest


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


def _cut_row(cut: Allowed, allowed: Allowed) -> tuple[Scores, float]:
    return cut[allowed].astype(np.float64), len(cut) - 1.0


def _milp(objective: Scores, allowed: Allowed, rows: Sequence[tuple[Scores, float]], time_limit_s: float) -> Choice | None:
    groups, _ = np.nonzero(allowed)
    if not len(groups):
        return () if all(right >= 0 for _, right in rows) else None
    one_each = sparse.csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if rows:
        matrix = sparse.csr_array(np.array([coefficients for coefficients, _ in rows]))
        constraints.append(LinearConstraint(matrix, -np.inf, np.array([right for _, right in rows])))
    options = {"mip_rel_gap": 0.0, "time_limit": time_limit_s}
    with quiet_stdout():
        result = milp(objective[allowed], integrality=1, bounds=Bounds(0, 1), constraints=constraints, options=options)
    _check_result(result, time_limit_s)
    if result.x is None:
        return None
    found = np.full(allowed.shape, -1.0)
    found[allowed] = result.x
    return tuple(int(index) for index in found.argmax(axis=1))


def _check_result(result: Any, time_limit_s: float) -> None:
    infeasible = 2
    if result.status not in (0, 1, infeasible) or (result.status == 1 and result.x is None):
        raise BitscapeError(f"the integer programme was not solved: {result.message}; offer fewer candidates")
    if result.status == 1:
        _log.warning("the integer programme stopped after %g s; its choice is not proven optimal", time_limit_s)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drop what C code writes to standard output: HiGHS prints a stray line at times, which breaks JSON output."""
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        _flush_c()
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush_c()  # C buffers its output: without this the line would appear after the redirection
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush_c() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
