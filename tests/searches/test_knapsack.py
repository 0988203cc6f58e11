import ctypes
import math
import os
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from bitscape.searches import knapsack, programme
from bitscape.searches.knapsack import CapRow, UndecidedError, smallest
from bitscape.searches.programme import Choice, Outcome, row_of

pytestmark = pytest.mark.slow


def row(costs: list[list[int]], limit: int, *, fixed: int = 0, additive: bool = True) -> CapRow:
    return CapRow("bitops", np.array(costs, dtype=object), limit, fixed, additive)


def solve(scores: np.ndarray, caps: list[CapRow], **settings: Any) -> Choice | None:
    """The choice alone."""
    solution = knapsack.solve(scores, caps, **settings)
    return None if solution is None else solution.choice


def near_best(*given: Any) -> list[Choice]:
    """The choices alone."""
    return [solution.choice for solution in knapsack.near_best(*given)]


def brute(scores: np.ndarray, caps: list[CapRow]) -> float:
    totals = [
        sum(scores[group, at] for group, at in enumerate(choice))
        for choice in product(range(scores.shape[1]), repeat=scores.shape[0])
        if all(cap.holds(choice) for cap in caps)
    ]
    return min(totals, default=math.inf)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[CapRow]]:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    magnitude = draw(st.sampled_from([3, 10**6, 10**15, 10**20]))
    numbers = st.one_of(st.floats(0, 1), st.floats(0, 1e-9), st.floats(0, 1e12), st.just(math.inf), st.just(1.0))
    scores = np.array([[draw(numbers) for _ in range(shape[1])] for _ in range(shape[0])])
    caps = []
    for _ in range(draw(st.integers(1, 3))):
        costs = [[draw(st.integers(0, magnitude)) for _ in range(shape[1])] for _ in range(shape[0])]
        any_choice = [draw(st.integers(0, shape[1] - 1)) for _ in range(shape[0])]
        cap = row(costs, 0, fixed=draw(st.integers(0, magnitude)), additive=draw(st.booleans()))
        slack = draw(st.sampled_from([0, 0, 1, -1, magnitude // 3]))
        caps.append(CapRow(cap.name, cap.costs, cap.total(tuple(any_choice)) + slack, cap.fixed, cap.additive))
    return scores, caps


@given(problems())
def test_the_optimum_equals_brute_force_and_no_cap_is_exceeded(problem: tuple[np.ndarray, list[CapRow]]) -> None:
    scores, caps = problem
    choice = solve(scores, caps)
    best = brute(scores, caps)
    if choice is None:
        assert best == math.inf
        return
    assert all(cap.holds(choice) for cap in caps)
    total = sum(scores[group, at] for group, at in enumerate(choice))
    cheapest = scores.min(axis=1).sum()
    assert total - best <= 1e-8 * (best - cheapest) + 1e-15 * max(best, 1e-300)


@given(problems())
def test_the_smallest_total_equals_brute_force(problem: tuple[np.ndarray, list[CapRow]]) -> None:
    scores, (cap, *others) = problem
    if not np.isfinite(scores).any(axis=1).all():
        return
    allowed = [np.flatnonzero(line) for line in np.isfinite(scores)]
    totals = [cap.total(choice) for choice in product(*allowed) if all(other.holds(choice) for other in others)]
    found = smallest(cap, others, np.isfinite(scores))
    assert (found is None) == (not totals)
    if found is not None:
        assert found in totals
        assert found - min(totals) <= 1e-8 * found


@given(problems(), st.integers(1, 6), st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_the_near_best_equal_brute_force(problem: tuple[np.ndarray, list[CapRow]], count: int, within: float) -> None:
    scores, caps = problem
    found = near_best(scores, caps, count, within)
    if (first := solve(scores, caps)) is None:
        assert found == []
        return
    assert found[0] == first
    assert len(set(found)) == len(found)
    assert all(cap.holds(choice) for cap in caps for choice in found)
    regret = scores - scores.min(axis=1, keepdims=True)  # a choice's regret is its total less the ideal's
    totals = [sum(regret[group, at] for group, at in enumerate(choice)) for choice in found]
    everything = sorted(
        sum(regret[group, at] for group, at in enumerate(choice))
        for choice in product(range(scores.shape[1]), repeat=scores.shape[0])
        if all(cap.holds(choice) for cap in caps)
    )
    near = [sum(total <= everything[0] * (1 + within + error) for total in everything) for error in (-1e-8, 1e-8)]
    assert min(count, near[0]) <= len(found) <= min(count, near[1])
    assert totals[1:] == sorted(totals[1:])
    np.testing.assert_allclose(totals, everything[: len(found)], rtol=1e-8)


def test_equal_choices_come_one_after_the_other_and_worse_ones_not_at_all() -> None:
    scores = np.array([[0.0, 1.0, 1.0]] * 3)
    one_short = row([[1, 0, 0]] * 3, 2)
    found = near_best(scores, [one_short], 99, 0.99)
    assert sorted(found) == [(0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (1, 0, 0), (2, 0, 0)]
    assert len(near_best(scores, [one_short], 99, 1.0)) == 6 + 12
    assert len(near_best(scores, [one_short], 99, 2.0)) == 6 + 12 + 8


def test_where_no_cap_binds_only_equals_of_the_best_are_near_it() -> None:
    scores = np.array([[5.0, 5.0, 5.001], [-7.0, -6.999, 3.0]])
    assert sorted(near_best(scores, [], 99, 1e6)) == [(0, 0), (1, 0)]


@given(st.integers(0, 10**6))
def test_neither_offset_nor_unit_of_the_scores_decides_what_is_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, cap = rng.integers(0, 100, (4, 4)).astype(float), row(rng.integers(0, 10, (4, 4)).tolist(), 18)
    found = near_best(scores, [cap], 99, 0.2)
    moved = scores * 4.0 - rng.integers(0, 1000, (4, 1))
    assert set(near_best(moved, [cap], 99, 0.2)) == set(found)


def test_excluded_choices_do_not_come_back() -> None:
    scores, caps = np.array([[0.0, 1.0], [0.0, 3.0]]), [row([[1, 1], [1, 1]], 2)]
    found: list[tuple[int, ...]] = []
    while (choice := solve(scores, caps, excluded=found)) is not None:
        found.append(choice)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_list_that_the_time_ended_is_returned_with_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def first_only(*given: Any, excluded: Any = (), **settings: Any) -> Any:
        if excluded:
            raise UndecidedError("the time ended")
        return first_solve(*given, **settings)

    first_solve = knapsack.solve
    monkeypatch.setattr(knapsack, "solve", first_only)
    assert near_best(np.array([[1.0, 0.0], [1.0, 0.0]]), [row([[0, 1], [0, 1]], 1)], 3, 100.0) in ([(1, 0)], [(0, 1)])
    assert "only 1 near-best choices are known (the time ended)" in caplog.text


def test_a_choice_that_breaks_a_cap_within_the_solvers_tolerance_is_cut_off() -> None:
    # Ten groups could each save a score of 1 for one unit of cost more; the cap has room for none.
    big = 10**10
    costs = [[0, big, big + 1]] * 10
    scores = np.array([[50.0, 1.0, 0.0]] * 10)
    assert solve(scores, [row(costs, 10 * big)]) == (1,) * 10


def test_choices_just_over_and_just_within_the_cap_are_told_apart() -> None:
    # Each score of 0 costs one unit more than a score of 1; the cap has room for four such units in nine thousand millions.
    big = 10**9
    exact = row([[0, big, big + 1]] * 9, 9 * big + 4)
    solution = knapsack.solve(np.array([[50.0, 1.0, 0.0]] * 9), [exact])
    assert solution is not None and exact.holds(solution.choice)
    assert (solution.regret, solution.gap) == (5.0, 0.0)


@pytest.mark.parametrize("spread", [3, 1000, 10**7])
def test_nearly_equal_costs_are_solved_exactly(spread: int) -> None:
    rng = np.random.default_rng(spread)
    costs = [[(10**9 + int(more)) * factor for factor in (4, 6, 8, 9)] for more in rng.integers(0, spread, 6)]
    scores, exact = rng.exponential(size=(6, 4)) * [8, 3, 2, 0], row(costs, sum(line[1] for line in costs))
    solution = knapsack.solve(scores, [exact])
    assert solution is not None and exact.holds(solution.choice) and solution.gap == 0.0
    regret = scores - scores.min(axis=1, keepdims=True)
    assert solution.regret == pytest.approx(brute(regret, [exact]), rel=1e-9)


@given(st.integers(0, 10**6))
def test_a_row_in_small_numbers_holds_for_the_same_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unit, spread = int(rng.integers(1, 10**9)), int(rng.integers(1, 100))
    costs = np.array([[int(k) * (unit + int(rng.integers(spread))) for k in rng.integers(0, 9, 3)] for _ in range(3)], dtype=object)
    room = int(costs[np.arange(3), rng.integers(0, 3, 3)].sum()) + int(rng.integers(-1, 2))
    if room < 0:
        return
    small = row_of(costs, room, np.ones(costs.shape, dtype=bool))
    for choice in product(range(3), repeat=3):
        high = sum(small.high[group, at] for group, at in enumerate(choice))
        low = 0.0 if small.low is None else sum(small.low[group, at] for group, at in enumerate(choice))
        fits = high <= small.right + 1e-6 and low <= small.rest + small.carry * (small.right - high) + 1e-6
        assert fits == (sum(costs[group, at] for group, at in enumerate(choice)) <= room)


def test_a_cap_that_only_a_loose_one_hides_is_met_exactly() -> None:
    costs = [[0, 10**12 + 7 * at, 2 * 10**12 + at * at] for at in range(6)]
    scores = np.array([[9.0, 3.0 + at / 10, 0.0] for at in range(6)])
    exact = row(costs, 6 * 10**12 + 7 * 15)
    choice = solve(scores, [exact])
    assert choice is not None and exact.holds(choice)
    assert sum(scores[group, at] for group, at in enumerate(choice)) == pytest.approx(brute(scores, [exact]))


def test_small_scores_beside_large_ones_are_not_rounded_away() -> None:
    scores = np.array([[1e6, 0.0, 1e3], [3e-7, 2e-7, 1e-7], [3e-7, 1e-7, 2e-7]])
    costs = [[0, 0, 0], [1, 2, 3], [1, 2, 3]]
    assert solve(scores, [row(costs, 4)]) == (1, 1, 1)


def test_without_groups_only_the_fixed_cost_counts() -> None:
    nothing = np.zeros((0, 3))
    costs = np.empty((0, 3), dtype=object)
    assert solve(nothing, [CapRow("bitops", costs, 5, fixed=5)]) == ()
    assert solve(nothing, [CapRow("bitops", costs, 4, fixed=5)]) is None
    assert near_best(nothing, [CapRow("bitops", costs, 5, fixed=5)], 3, 0.1) == [()]
    assert near_best(nothing, [CapRow("bitops", costs, 4, fixed=5)], 3, 0.1) == []
    assert solve(nothing, [CapRow("peak", costs, 4, fixed=5, additive=False)]) is None


def test_equal_input_gives_equal_output() -> None:
    scores = np.ones((20, 5))
    costs = [[1, 2, 3, 4, 5]] * 20
    assert solve(scores, [row(costs, 50)]) == solve(scores, [row(costs, 50)])


def stopped(objective: Any, share: float | None, bound: float) -> SimpleNamespace:
    """What `milp` returns when its time ends with every candidate at `share`, the last at a little more."""
    x = None if share is None else share + np.arange(len(objective)) / 1e3
    return SimpleNamespace(status=1, x=x, mip_dual_bound=bound, message="time")


@given(problems())
def test_pricing_the_caps_first_changes_no_total(problem: tuple[np.ndarray, list[CapRow]]) -> None:
    scores, caps = problem
    at_once = knapsack.solve(scores, caps)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(knapsack, "SMALL", 0)
        patched.setattr(knapsack, "FIRST_CORE", 1)
        priced = knapsack.solve(scores, caps)
    assert (at_once is None) == (priced is None)
    if at_once is not None and priced is not None:
        assert priced.gap == at_once.gap == 0.0
        assert priced.regret == pytest.approx(at_once.regret, rel=1e-8)


def test_a_time_limit_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    # The cap forbids the first, the relaxation knows that 1 is the least, and the solver ends with the 2.
    scores, caps = np.array([[0.0, 1.0, 2.0]]), [row([[2, 1, 0]], 1)]
    monkeypatch.setattr(knapsack, "SMALL", 0)
    monkeypatch.setattr(optimize, "milp", lambda c, **_: stopped(c, 0.1, 0.0))
    solution = knapsack.solve(scores, caps, time_limit_s=0.0)
    assert solution is not None
    assert solution.choice == (2,)
    assert (solution.regret, solution.bound, solution.gap) == (2.0, 1.0, 0.5)


def test_a_time_limit_before_any_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "milp", lambda c, **_: stopped(c, None, 0.0))
    with pytest.raises(UndecidedError, match="the time ended before a policy within bitops was seen"):
        solve(np.array([[0.0, 1.0]]), [row([[2, 1]], 2)])


def test_a_time_limit_after_a_choice_keeps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([Outcome((0,), 0.5, error=1.0), Outcome(None, 0.75)])
    monkeypatch.setattr(knapsack, "integer", lambda *_: next(outcomes))
    solution = knapsack.solve(np.array([[1.0, 0.0]]), [row([[1, 2]], 2)])
    assert solution is not None
    assert (solution.choice, solution.regret, solution.bound, solution.gap) == ((0,), 1.0, 0.75, 0.25)


def test_a_worse_choice_at_the_end_of_the_time_does_not_replace_a_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = iter([Outcome((1,), 0.5, error=1.0), Outcome((0,), 0.75)])
    monkeypatch.setattr(knapsack, "integer", lambda *_: next(outcomes))
    solution = knapsack.solve(np.array([[2.0, 1.0, 0.0]]), [row([[1, 1, 2]], 2)])
    assert solution is not None
    assert (solution.choice, solution.regret) == ((1,), 1.0)


def test_a_solver_that_always_breaks_the_cap_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "integer", lambda *_: Outcome((1, 1), 0.0))
    with pytest.raises(UndecidedError, match="within bitops"):
        solve(np.array([[1.0, 0.0], [1.0, 0.0]]), [row([[1, 2], [1, 2]], 3)], time_limit_s=0.0)


def test_a_long_solve_says_how_long_it_may_take(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(programme, "PROGRESS_S", 0.01)
    with caplog.at_level("INFO"), programme.ticking("allocation", 120.0):
        deadline = time.monotonic() + 30
        while "allocation" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "s so far, at most 120 s" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="reads C's standard output through libc")
def test_c_output_of_the_solver_does_not_reach_stdout() -> None:
    code = (
        "import ctypes; from bitscape.searches.programme import quiet_stdout\n"
        "print('before')\n"
        "with quiet_stdout(): ctypes.CDLL(None).puts(b'a line from C')\n"
        "print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["before", "after"]
    assert ctypes.CDLL(None).fflush(None) == 0


def test_a_closed_stdout_is_no_error() -> None:
    code = "import os; os.close(1)\nfrom bitscape.searches.programme import quiet_stdout\n"
    code += "with quiet_stdout(): pass\nos._exit(7)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
