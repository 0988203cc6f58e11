import re

import pytest
import torch

from bitscape.errors import BitscapeError
from bitscape.quant import grid as grid_module
from bitscape.quant.grid import MID_RISE, grid

ROW = re.compile(r"^ +(\d) +(signed|unsigned)(, [a-z-]+)? +(-?\d+) +(-?\d+) +(-?[\d.]+) +(yes|no) +(-?[\d.]+) \.\. (-?[\d.]+)")
TABLE = [match.groups() for line in grid_module.__doc__.splitlines() if (match := ROW.match(line))]


def test_the_table_has_all_its_rows():
    assert len(TABLE) == 10


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1]}{row[2] or ''}")
def test_the_truth_table_holds(row):
    bits, sign, kind, qmin, qmax, zero_point, zero_exact, low, high = row
    kind = (kind or "").removeprefix(", ")
    found = grid(int(bits), signed=sign == "signed", narrow=kind == "narrow", mid_rise=kind == "mid-rise")
    assert (found.qmin, found.qmax, found.zero_point) == (int(qmin), int(qmax), float(zero_point))
    assert (found.qmin - found.zero_point, found.qmax - found.zero_point) == (float(low), float(high))
    assert float(found.zero_point).is_integer() == (zero_exact == "yes")


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_a_tensor_of_bits_gives_the_same_limits(signed, narrow, mid_rise):
    bits = torch.arange(1, 9).reshape(8, 1, 1, 1)
    limits = grid(bits, signed=signed, narrow=narrow, mid_rise=mid_rise)
    for index in range(8):
        expected = grid(index + 1, signed=signed, narrow=narrow, mid_rise=mid_rise)
        assert limits.qmin[index].item() == expected.qmin
        assert limits.qmax[index].item() == expected.qmax
        zero_point = limits.zero_point
        found = zero_point[index].item() if isinstance(zero_point, torch.Tensor) else zero_point
        assert found == expected.zero_point


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("settings", [{"signed": True}, {"signed": False}, {"signed": True, "mid_rise": True}])
def test_every_grid_but_a_narrow_one_has_all_its_codes(bits, settings):
    limits = grid(bits, **settings)
    assert limits.qmax - limits.qmin + 1 == 2**bits


def test_one_signed_bit_is_a_sign_even_when_narrow():
    assert grid(1, signed=True, narrow=True) == grid(1, signed=True)
    assert grid(1, signed=True).zero_point == MID_RISE


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_outside_1_to_8_are_an_error(bits):
    with pytest.raises(BitscapeError, match=f"bits = {bits}: a bit-width is an integer from 1 to 8"):
        grid(bits, signed=True)
