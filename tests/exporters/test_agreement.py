import numpy as np
import pytest

from bitscape.errors import BitscapeError
from bitscape.exporters.agreement import Comparison


def compared(*batches):
    comparison = Comparison()
    for expected, actual in batches:
        count = len(next(iter(expected.values())))
        comparison.add(count, *({name: np.asarray(values) for name, values in each.items()} for each in (expected, actual)))
    return comparison.result()


def floats(*rows):
    return np.array(rows, np.float32)


def test_scores_by_hand_over_two_batches():
    first = {"scores": floats([3, 0], [0, 4])}, {"scores": floats([3, 0], [4, 0])}
    second = {"scores": floats([0, 5])}, {"scores": floats([0, 5])}
    found = compared(first, second)["scores"]
    assert (found.images, found.same_class, found.identical) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.difference == pytest.approx(np.sqrt(32 / 50))


def test_each_output_is_compared_and_maps_have_no_classes():
    maps = np.ones((2, 3, 4, 4), np.float32)
    found = compared(({"map": maps, "one": floats([1], [2])}, {"map": maps * 1.5, "one": floats([1], [2])}))
    assert (found["map"].difference, found["map"].same_class, found["map"].identical) == (0.5, None, 0.0)
    assert (found["one"].difference, found["one"].same_class, found["one"].identical) == (0.0, None, 1.0)


def test_of_whole_numbers_and_truth_values_the_share_that_differs_counts():
    found = compared(({"index": [[7, 1000], [0, 5]], "keep": [True, False]}, {"index": [[7, 1], [0, 5]], "keep": [True, True]}))
    assert (found["index"].difference, found["index"].identical, found["index"].same_class) == (0.25, 0.5, None)
    assert found["keep"].difference == 0.5


def test_an_output_without_an_axis_of_images():
    comparison = Comparison()
    for actual in (floats([1, 2]), floats([1, 1])):
        comparison.add(4, {"anchors": floats([1, 2])}, {"anchors": actual})
    found = comparison.result()["anchors"]
    assert (found.images, found.identical, found.same_class) == (8, 0.5, None)
    assert found.difference == pytest.approx(np.sqrt(1 / 10))


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        (floats([-np.inf, 1]), floats([-np.inf, 1]), 0.0),
        (floats([np.nan, 1]), floats([np.nan, 1]), 0.0),
        (floats([np.nan, 1]), floats([0, 1]), np.inf),
        (floats([1, 1]), floats([np.nan, 1]), np.inf),
        (floats([-np.inf, 1]), floats([5, 1]), np.inf),
        (floats([0, 0]), floats([0, 0]), 0.0),
        (floats([0, 0]), floats([0, 1]), np.inf),
        (floats([1e-30, 0]), floats([2e-30, 0]), pytest.approx(1.0)),
    ],
)
def test_values_that_are_not_finite_and_values_near_zero(expected, actual, difference):
    assert compared(({"x": expected}, {"x": actual}))["x"].difference == difference


@pytest.mark.parametrize("actual", [{"x": np.zeros((2, 3))}, {"y": np.zeros((2, 2))}, {}])
def test_other_outputs_are_an_error(actual):
    with pytest.raises(BitscapeError, match=r"\(2, 2\)\} were expected"):
        Comparison().add(2, {"x": np.zeros((2, 2))}, actual)
