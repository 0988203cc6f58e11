import numpy as np
import pytest

from bitscape.exporters.tflite.operators import Windows
from bitscape.exporters.tflite.parity import multiplied


@pytest.mark.parametrize(
    ("total", "multiplier", "code"),
    [
        (3, 0.5, 2),  # halves up
        (-3, 0.5, -1),
        (5, 0.25, 2),  # 1.25, but 2.5 rounds to 3 first, and 3 / 2 to 2
        (7, 2.0, 14),
        (4, 0.99 / 8, 1),  # 0.495, but 3.96 rounds to 4 first, and 4 / 8 to 1
        (3, 0.99 / 8, 0),
    ],
)
def test_sums_of_32_bits_are_rounded_twice(total: int, multiplier: float, code: int) -> None:
    assert multiplied(np.array([total]), np.array([multiplier]), wide=False).tolist() == [code]


def test_sums_of_64_bits_meet_16_bits_of_the_multiplier() -> None:
    third = np.array([1 / 3])
    found = multiplied(np.array([3 * 10**6, 3, -3]), third, wide=True)
    assert found.tolist() == [round(3 * 10**6 * 21845 / 2**16), 1, -1]
    assert found[0] != 10**6


def test_a_multiplier_that_rounds_up_to_a_power_of_two() -> None:
    assert multiplied(np.array([1000]), np.array([np.nextafter(1.0, 0)]), wide=False).tolist() == [1000]


def test_padding_of_tensorflows_kind_is_told_from_others() -> None:
    stem = Windows.of([3, 3], 2, 1, 1)
    assert stem.same((8, 8)) == [(0, 1), (0, 1)] and stem.same((7, 7)) == [(1, 1), (1, 1)]
    assert stem.pads((8, 8), (4, 4)) == [(1, 0), (1, 0)]
    assert Windows.of([3, 3], 1, "same", 2).pads((8, 8), (8, 8)) == [(2, 2), (2, 2)]
    assert Windows.of([2, 2], 2, 0, 1).pads((5, 4), (3, 2)) == [(0, 1), (0, 0)]  # rounded up
