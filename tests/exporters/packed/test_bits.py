import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitscape.errors import BitscapeError
from bitscape.exporters.packed.bits import pack_bits, unpack_bits, words_of


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))
    return np.array(codes, np.uint8), bits


def naive_bytes(codes, bits: int) -> bytes:
    """One big number, code i shifted to bit i * bits; its little-endian bytes in whole words."""
    number = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 32) * 4, "little")


@given(codes_and_bits())
def test_the_bytes_are_those_of_a_naive_bit_stream(case):
    codes, bits = case
    assert pack_bits(codes, bits).astype("<i4").tobytes() == naive_bytes(codes, bits)


@given(codes_and_bits())
def test_unpacking_gives_the_codes_back(case):
    codes, bits = case
    words = pack_bits(codes, bits)
    assert words.dtype == np.int32
    assert words.size == words_of(codes.size, bits)
    restored = unpack_bits(words, bits, codes.size)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_whole_words_are_slices_of_the_stream(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 32), dtype=np.uint8)
    rows = np.stack([pack_bits(row, bits) for row in codes])
    np.testing.assert_array_equal(pack_bits(codes, bits).reshape(5, -1), rows)
    np.testing.assert_array_equal(unpack_bits(rows, bits, codes.size), codes.reshape(-1))


def test_codes_may_be_wider_integers():
    codes = np.arange(8, dtype=np.uint64)
    np.testing.assert_array_equal(unpack_bits(pack_bits(codes, 3), 3, 8), codes)


def test_a_code_that_does_not_fit_is_an_error():
    with pytest.raises(BitscapeError, match="the largest is 8; 3 bits hold 0 to 7"):
        pack_bits(np.array([1, 8], np.uint8), 3)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_bit_width_outside_1_to_8_is_an_error(bits):
    with pytest.raises(BitscapeError, match=f"bits = {bits}"):
        pack_bits(np.zeros(1, np.uint8), bits)
    with pytest.raises(BitscapeError, match=f"bits = {bits}"):
        unpack_bits(np.zeros(9, np.int32), bits, 1)


def test_too_few_words_are_an_error():
    with pytest.raises(BitscapeError, match="words: 1 given, 33 codes of 1 bits take 2"):
        unpack_bits(np.zeros(1, np.int32), 1, 33)
