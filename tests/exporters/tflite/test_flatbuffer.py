import numpy as np
import pytest

from bitscape.exporters.tflite.flatbuffer import pack_nibbles, unpack_nibbles


def test_the_first_of_two_codes_stands_in_the_low_bits() -> None:
    assert list(pack_nibbles(np.array([[1, -1], [-8, 7], [3, 0]]))) == [0xF1, 0x78, 0x03]
    assert list(pack_nibbles(np.array([5]))) == [0x05]


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_codes_come_back(count: int) -> None:
    codes = np.random.default_rng(count).integers(-8, 8, count).astype(np.int8)
    packed = np.frombuffer(pack_nibbles(codes), np.uint8)
    assert len(packed) == -(-count // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed, count), codes)
