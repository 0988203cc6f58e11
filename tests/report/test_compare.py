from pathlib import Path
from typing import Any

import pytest

from bitscape.policy import Policy
from bitscape.report.compare import comparisons, groups, verdict, why_none
from bitscape.report.inputs import TrainedRun, read_inputs
from tests.report.made import policy, run, searched

UNIFORM, MIXED = searched("3/3", "3/3", "uniform"), searched()


def made(folder: Path, runs: list[tuple[Policy | None, int, float]], **changed: Any) -> list[TrainedRun]:
    before = len(list(folder.iterdir()))
    folders = [run(folder / f"run{before + at}", policy=own, seed=seed, top1=top1, **changed) for at, (own, seed, top1) in enumerate(runs)]
    return list(read_inputs(folders).runs.values())


def sentences(runs: list[TrainedRun]) -> list[str]:
    return [verdict(each) for each in comparisons(groups(runs))]


def test_a_difference_whose_interval_is_beyond_zero_is_an_answer(tmp_path: Path) -> None:
    # differences 1.9, 2.0, 2.1: mean 2, s = 0.1, half = 4.30265 * 0.1 / sqrt(3) = 0.2484
    runs = made(tmp_path, [(UNIFORM, seed, 90.0 + seed) for seed in range(3)] + [(MIXED, seed, 91.9 + 1.1 * seed) for seed in (2, 0, 1)])
    assert sentences(runs) == [
        "Yes: fisher is ahead of uniform 3/3 by 2.00 points of top-1 in the mean of 3 pairs of runs with the same seed "
        "(95 % interval +1.75 to +2.25)."
    ]


def test_behind_is_no(tmp_path: Path) -> None:
    (said,) = sentences(made(tmp_path, [(UNIFORM, 0, 90.0), (UNIFORM, 1, 90.0), (MIXED, 0, 88.0), (MIXED, 1, 88.1)]))
    # -2.0, -1.9: half = 12.7062 * 0.070711 / sqrt(2) = 0.6353
    assert said.startswith("No: fisher is behind uniform 3/3 by 1.95 points") and "(95 % interval -2.59 to -1.31)" in said


def test_an_interval_that_holds_zero_is_no_difference_seen(tmp_path: Path) -> None:
    (said,) = sentences(made(tmp_path, [(UNIFORM, 0, 90.0), (UNIFORM, 1, 90.0), (MIXED, 0, 91.0), (MIXED, 1, 92.0)]))
    assert said.startswith("No difference seen between fisher and uniform 3/3: +1.50 points")
    assert said.endswith("the 95 % interval -4.85 to +7.85 holds zero.")


@pytest.mark.parametrize(("seed", "shared"), [(0, "one seed, where fisher has +1.00 points of top-1"), (5, "no seed")])
def test_fewer_than_two_pairs_have_no_interval(tmp_path: Path, seed: int, shared: str) -> None:
    (said,) = sentences(made(tmp_path, [(UNIFORM, 0, 90.0), (UNIFORM, 1, 90.0), (MIXED, seed, 91.0)]))
    assert said == f"No interval can be given: fisher and uniform 3/3 share {shared}; train both with two or more same seeds."


def test_the_best_uniform_one_is_what_counts(tmp_path: Path) -> None:
    other = searched("4/2", "4/2", "uniform")
    runs = made(tmp_path, [(own, seed, top1) for seed in range(2) for own, top1 in ((UNIFORM, 90.0), (other, 93.0), (MIXED, 91.0))])
    (compared,) = comparisons(groups(runs))
    assert compared.reference.method == "uniform 4/2"
    assert compared.difference is not None and compared.difference.mean == -2.0


def test_only_runs_alike_are_compared(tmp_path: Path) -> None:
    mixed = [(MIXED, seed, 91.0) for seed in range(2)]
    uniform = [(UNIFORM, seed, 90.0) for seed in range(2)]
    others = {
        "epochs and optimizer.lr differ": made(tmp_path, uniform, epochs=3, optimizer={"kind": "Sgd", "lr": 0.1}),
        "have other budgets": made(tmp_path, [(policy("3/3", "3/3", method="uniform", budget={"bitops": 1}), 0, 90.0)]),
        "No ended run with uniform bits": made(tmp_path, [(None, 0, 95.0)]) + made(tmp_path, uniform, ended=False),
    }
    for reason, runs in others.items():
        found = groups(made(tmp_path, mixed) + runs)
        assert comparisons(found) == []
        assert reason in why_none(found)


def test_a_uniform_policy_that_tells_no_budget_is_compared(tmp_path: Path) -> None:
    assert len(sentences(made(tmp_path, [(policy("3/3", "3/3"), 0, 90.0), (MIXED, 0, 91.0)]))) == 1


def test_runs_that_share_a_seed_are_averaged(tmp_path: Path) -> None:
    (group,) = groups(made(tmp_path, [(MIXED, 0, 90.0), (searched("4/4", "2/2"), 0, 92.0), (MIXED, 1, 80.0)]))
    assert group.top1 == {0: 91.0, 1: 80.0}
    assert group.mean == 85.5
