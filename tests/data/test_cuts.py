import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitscape.data.cuts import Cuts


@pytest.mark.parametrize(
    ("images", "size", "fewest", "lengths"),
    [
        (0, 4, 2, []),
        (1, 4, 2, [1]),
        (8, 4, 2, [4, 4]),
        (9, 4, 2, [4, 5]),
        (10, 4, 2, [4, 4, 2]),
        (5, 4, 2, [5]),
        (3, 1, 2, [1, 1, 1]),
        (11, 4, 4, [4, 7]),
        (11, 3, 8, [3, 3, 5]),
        (3, 8, 4, [3]),
    ],
)
def test_a_rest_that_is_too_small_joins_the_batch_before(images, size, fewest, lengths):
    assert list(map(len, Cuts(images, size, fewest))) == lengths


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12))
def test_every_image_is_in_one_batch_in_order(images, size, fewest):
    cuts = Cuts(images, size, fewest)
    assert [row for rows in cuts for row in rows] == list(range(images))
    assert len(list(cuts)) == len(cuts) and list(cuts[1:]) == list(cuts)[1:]
    assert all(len(rows) >= min(fewest, size) for rows in cuts[: len(cuts) if images >= size else 0])
