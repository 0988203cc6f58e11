"""Codes of 1 to 8 bits as a dense bit stream in 32-bit words, and back.

Code i takes the bits i*b .. i*b+b-1 of the stream, lowest bit first; bit j of the stream is bit j % 32 of word j // 32.
In a file, words are little-endian: the bytes are those of compressed-tensors' `pack_to_int32`.
"""

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError

_LANES = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
"""Widths of the lanes that eight codes in a 64-bit integer are merged from, and the mask of every other lane."""


def pack_bits(codes: NDArray[np.unsignedinteger], bits: int) -> NDArray[np.int32]:
    """Pack `codes` (any shape, read in C order, each below 2^bits) into ceil(n * bits / 32) words; unused bits are 0.

    Raises:
        BitscapeError: bits outside 1..8, or a code that does not fit.
    """
    _check(bits)
    if codes.size and int(codes.max()) >> bits:
        raise BitscapeError(f"codes: the largest is {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}")
    groups = -(-codes.size // 8)
    eights = np.zeros(groups * 8, np.uint8)
    eights[: codes.size] = codes.reshape(-1)
    lanes = eights.view("<u8")
    filled = bits  # bits in use in each lane
    for width, mask in _LANES:
        # The upper lane of each pair moves down to the lower one's last used bit.
        lanes = (lanes & np.uint64(mask)) | ((lanes >> np.uint64(width)) & np.uint64(mask)) << np.uint64(filled)
        filled *= 2
    stream = np.zeros(words_of(groups * 8, bits) * 4, np.uint8)
    stream[: groups * bits].reshape(groups, bits)[:] = lanes.view(np.uint8).reshape(groups, 8)[:, :bits]
    return stream.view("<i4")[: words_of(codes.size, bits)].astype(np.int32)


def unpack_bits(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` codes of `words` (any shape, read in C order), as what `pack_bits` was given, flat.

    Raises:
        BitscapeError: bits outside 1..8, or fewer words than `count` codes take.
    """
    _check(bits)
    if words.size < words_of(count, bits):
        raise BitscapeError(f"words: {words.size} given, {count} codes of {bits} bits take {words_of(count, bits)}")
    groups, used = -(-count // 8), words_of(count, bits)
    stream = np.zeros(words_of(groups * 8, bits) * 4, np.uint8)
    stream[: used * 4] = words.reshape(-1)[:used].astype("<i4").view(np.uint8)
    eights = np.zeros((groups, 8), np.uint8)
    eights[:, :bits] = stream[: groups * bits].reshape(groups, bits)
    lanes = eights.reshape(-1).view("<u8")
    for width, mask in reversed(_LANES):
        filled = bits * width // 8
        low = np.uint64(mask & _repeated((1 << filled) - 1, width))
        lanes = (lanes & low) | ((lanes >> np.uint64(filled)) & low) << np.uint64(width)
    return lanes.view(np.uint8)[:count]


def words_of(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def _repeated(pattern: int, width: int) -> int:
    """`pattern` at the bottom of every second lane of `width` bits."""
    return sum(pattern << shift for shift in range(0, 64, 2 * width))


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise BitscapeError(f"bits = {bits}: a bit-width is an integer from 1 to 8")
