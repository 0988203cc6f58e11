"""The integer programme of an allocation, as HiGHS (scipy) sees it: linear rows, their relaxation, and a solution of a part.

HiGHS works in floats and accepts a row that is exceeded by 1e-6. `row_of` therefore rewrites a cap over large integers as rows
over small ones that the same choices meet, which also tightens the relaxation where costs are nearly equal.

scipy is imported where it solves: a search that needs no solver does without its import.
"""

import ctypes
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError

_log = logging.getLogger("bitscape.searches")

Allowed = NDArray[np.bool_]
Scores = NDArray[np.float64]
Choice = tuple[int, ...]

ABSOLUTE_GAP = 1e-6
"""HiGHS stops when its bound is as close as this."""
SCALE = 1e4
"""The largest difference of objectives handed to HiGHS."""
LARGEST = 1e6
"""Largest coefficient of a row: one unit of a row of small integers then stays far above what HiGHS tolerates."""
STEP = 1.2
"""Units that may divide the costs differ at least by this factor."""
PROGRESS_S = 5.0


@dataclass(frozen=True, eq=False)
class Row:
    """A limit in small numbers: high <= right, and low <= rest + carry * (right - high), summed over the chosen candidates."""

    high: Scores
    """Shape (groups, candidates)."""
    right: float
    low: Scores | None = None
    """Shape (groups, candidates); None where the highs alone decide."""
    rest: float = 0.0
    carry: float = 0.0
    unit: float = 1.0
    """The highs are whole numbers times 1 / unit."""


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A lower bound of every choice's total, and what each candidate adds to it."""

    least: float
    """No total is smaller."""
    excess: Scores
    """Shape (groups, candidates): a choice with this candidate totals at least `least` + its excess."""


@dataclass(frozen=True)
class Outcome:
    """What the integer programme came to: the best choice known, and a lower bound of all."""

    choice: Choice | None
    """None if no choice meets the rows, or none was seen within the time."""
    bound: float
    """No choice totals less; infinite when none meets the rows."""
    error: float = 0.0
    """By how much both may be wrong: HiGHS stops at an absolute gap."""


def row_of(costs: NDArray[np.object_], room: int, allowed: Allowed) -> Row:
    """State "the costs of the chosen candidates add up to at most `room`" in small numbers.

    Costs and room are divided by the common divisor. A unit u then splits each cost into u * high + low, and the room
    into u * q + r. A sum of highs above q is too much, one of q leaves r for the lows, and each one less leaves u more:
    or only as much as the lows of any choice need (`carry`), which is little where costs are nearly equal, and ties
    what HiGHS may mix of candidates more closely.

    Args:
        costs: integers from 0, shape (groups, candidates).
        room: largest sum allowed.
        allowed: candidates that count.
    """
    costs = np.where(allowed, costs, 0)
    if int(costs.max(initial=0)) < 2**62:
        costs = costs.astype(np.int64)
    divisor = math.gcd(*map(int, costs.flat)) or 1
    costs, room = costs // divisor, room // divisor
    unit, largest_low = min(_units(costs, allowed), key=lambda pair: (pair[1] + 1) / pair[0])
    high, low = costs // unit, costs % unit
    quotient, rest = divmod(room, unit)
    high_scale, low_scale = _scale(high), _scale(low)
    carry = min(max(largest_low - rest, 0), unit)
    if not carry:
        return Row(high / high_scale, quotient / high_scale)
    return Row(high / high_scale, quotient / high_scale, low / low_scale, rest / low_scale, carry * high_scale / low_scale, high_scale)


def _units(costs: NDArray[Any], allowed: Allowed) -> Iterator[tuple[int, int]]:
    """Yield units that may split the costs well, each with the largest sum of lows of a choice."""
    differences = np.unique(np.concatenate([np.diff(np.unique(row[mask])) for row, mask in zip(costs, allowed, strict=True)]))
    units, last = [1], 0.0
    for difference in map(int, differences):
        if difference > last * STEP:
            units.append(difference)
            last = difference
    for unit in units:
        yield unit, sum(map(int, (costs % unit).max(axis=1)))


def _scale(coefficients: NDArray[Any]) -> float:
    return max(1.0, int(coefficients.max(initial=0)) / LARGEST)


def relaxed(objective: Scores, allowed: Allowed, rows: Sequence[Row]) -> Relaxation | None:
    """Solve the linear relaxation; None if no choice meets the rows. Any prices of the rows give a valid bound."""
    from scipy.optimize import linprog

    groups, _ = np.nonzero(allowed)
    limits = [(row.high, row.right) for row in rows]
    limits += [(row.carry * row.high + row.low, row.carry * row.right + row.rest) for row in rows if row.low is not None]
    right = np.array([limit for _, limit in limits])
    unit = _largest(objective, allowed)
    with quiet_stdout():
        result = linprog(
            objective[allowed] / unit * SCALE,
            A_ub=np.array([coefficients[allowed] for coefficients, _ in limits]) if limits else None,
            b_ub=right if limits else None,
            A_eq=_one_each(groups),
            b_eq=np.ones(len(allowed)),
            method="highs",
        )
    infeasible = 2
    if result.status == infeasible:
        return None
    prices = np.zeros(len(limits)) if result.status or not limits else np.maximum(-result.ineqlin.marginals, 0.0) / SCALE * unit
    priced = np.where(allowed, objective, np.inf)
    for price, (coefficients, _) in zip(prices, limits, strict=True):
        priced = priced + price * coefficients
    cheapest = priced.min(axis=1, keepdims=True)
    return Relaxation(float(cheapest.sum() - prices @ right), priced - cheapest)


def integer(objective: Scores, allowed: Allowed, rows: Sequence[Row], time_limit_s: float) -> Outcome:
    """Solve the integer programme over the allowed candidates, in at most `time_limit_s` or little more."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups, _ = np.nonzero(allowed)
    least = np.where(allowed, objective, np.inf).min(axis=1, keepdims=True)
    counted = objective - least
    unit, offset = _largest(counted, allowed), float(least.sum())
    split = [row for row in rows if row.low is not None]
    columns, variables = len(groups), len(groups) + len(split)
    one_each = sparse.hstack([_one_each(groups), sparse.csr_array((len(allowed), len(split)))])
    constraints = [LinearConstraint(one_each, 1, 1), *_limits(rows, allowed, columns, variables)]
    upper = np.where(np.arange(variables) < columns, 1.0, np.inf)
    with quiet_stdout():
        result = milp(
            np.concatenate([counted[allowed] / unit * SCALE, np.zeros(len(split))]),
            integrality=1,
            bounds=Bounds(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
    infeasible = 2
    if result.status not in (0, 1, infeasible):
        raise BitscapeError(f"allocation: the solver failed ({result.message}); offer fewer candidates")
    if result.status == infeasible:
        return Outcome(None, math.inf)
    bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) / SCALE * unit + offset
    if result.x is None:
        return Outcome(None, bound)
    shares = np.full(allowed.shape, -1.0)
    shares[allowed] = result.x[:columns]
    return Outcome(tuple(int(index) for index in shares.argmax(axis=1)), bound, ABSOLUTE_GAP / SCALE * unit)


def _largest(objective: Scores, allowed: Allowed) -> float:
    return float(np.abs(objective[allowed]).max(initial=0.0)) or 1.0


def _limits(rows: Sequence[Row], allowed: Allowed, columns: int, variables: int) -> Iterator[Any]:
    """Yield the rows. What a split row leaves of its highs is a variable of its own, so that HiGHS can branch on it."""
    from scipy import sparse
    from scipy.optimize import LinearConstraint

    spare = columns
    for row in rows:
        line = np.zeros((1 if row.low is None else 2, variables))
        line[0, :columns] = row.high[allowed]
        if row.low is None:
            yield LinearConstraint(sparse.csr_array(line), -np.inf, row.right)
            continue
        line[1, :columns] = row.low[allowed]
        line[:, spare] = 1.0 / row.unit, -row.carry / row.unit
        yield LinearConstraint(sparse.csr_array(line), [row.right, -np.inf], [row.right, row.rest])
        spare += 1


def _one_each(groups: NDArray[np.int64]) -> Any:
    from scipy import sparse

    return sparse.csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))


@contextmanager
def ticking(label: str, time_limit_s: float) -> Iterator[None]:
    """Log every few seconds, while the block runs, how long it has run and when it will end at the latest."""
    ended = threading.Event()

    def tick() -> None:
        seconds = PROGRESS_S
        while not ended.wait(PROGRESS_S):
            _log.info("%s: %.0f s so far, at most %.0f s", label, seconds, time_limit_s)
            seconds += PROGRESS_S

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
