import pytest

from bitscape.report.differences import (
    difference,
    mean_difference,
    share_interval,
    smallest_seen,
)


def test_paired_differences_have_a_t_interval() -> None:
    # mean 2, standard deviation 1, n = 3: half of the interval is 4.3027 / sqrt(3).
    assert difference([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48], no difference seen"
    assert difference([-1.9, -2.0, -2.1]) == "-2.00 [-2.25, -1.75]"
    assert difference([0.5]) == "+0.50, one pair: no interval"
    assert difference([0.0, 0.0]) == "+0.00 [+0.00, +0.00], no difference seen"


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1.0, 1.1]])
def test_an_interval_that_holds_zero_is_always_said(values: list[float]) -> None:
    text = difference(values)
    low, high = (float(part) for part in text.split("[")[1].split("]")[0].split(","))
    assert (low <= 0 <= high) == text.endswith("no difference seen")


def test_the_ends_of_an_interval_by_hand() -> None:
    found = mean_difference([1.0, 2.0])  # t(0.975, 1) = 12.7062, s = 0.70711, s / sqrt(2) = 0.5
    assert (found.mean, found.n, found.is_seen) == (1.5, 2, False)
    assert found.interval == pytest.approx((1.5 - 6.3531, 1.5 + 6.3531), abs=1e-4)


def test_one_pair_shows_nothing_however_large() -> None:
    found = mean_difference([50.0])
    assert (found.half, found.interval, found.is_seen) == (None, None, False)


@pytest.mark.parametrize(
    ("percent", "samples", "ends"),
    [(50.0, 100, (40.38, 59.62)), (90.0, 100, (82.56, 94.48)), (100.0, 10, (72.25, 100.0))],
)
def test_the_interval_of_a_share_is_wilsons(
    percent: float, samples: int, ends: tuple[float, float]
) -> None:
    assert share_interval(percent, samples) == pytest.approx(ends, abs=0.01)


def test_the_smallest_difference_that_could_be_seen_by_hand() -> None:
    # s = 1, n = 3: (t(0.975, 2) + t(0.8, 2)) / sqrt(3) = (4.3027 + 1.0607) / sqrt(3)
    assert smallest_seen([1.0, 2.0, 3.0]) == pytest.approx(3.0965, abs=1e-4)
    assert smallest_seen([2.0, 2.0]) == 0
