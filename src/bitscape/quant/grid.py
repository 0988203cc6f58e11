"""The integer grid of a bit-width: which codes exist, and where real zero lies on it.

A real value is ``scale * (q - zero_point)`` with q in qmin .. qmax (the ONNX form; `scale` is LSQ's *step size*).

    bits  kind              qmin  qmax  zero_point   zero exact?  real extremes, in scales
    1     signed              -1     0        -0.5   no           -0.5 .. 0.5   (the sign)
    1     unsigned             0     1           0   yes             0 .. 1
    2     signed              -2     1           0   yes            -2 .. 1
    2     signed, narrow      -1     1           0   yes            -1 .. 1
    2     unsigned             0     3           0   yes             0 .. 3
    2     signed, mid-rise    -2     1        -0.5   no           -1.5 .. 1.5
    8     signed            -128   127           0   yes          -128 .. 127
    8     signed, narrow    -127   127           0   yes          -127 .. 127
    8     unsigned             0   255           0   yes             0 .. 255
    8     signed, mid-rise  -128   127        -0.5   no         -127.5 .. 127.5
    4     from -3             -3    12           0   yes             -3 .. 12

Grids that begin between the signed and the unsigned one are for activations with a short negative tail: an
integer zero point, written as levels instead of as codes.

A signed 1-bit grid is always mid-rise, also when narrow: {-1, 0} with zero at an end could hold no sign.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.policy import ACTIVATION_BITS

Number = float | Tensor
MID_RISE = -0.5
"""The zero point of levels that lie symmetrically around zero without containing it."""


@dataclass(frozen=True)
class Grid:
    """Integer limits and zero point; numbers, or tensors that broadcast against the data."""

    qmin: Number
    qmax: Number
    zero_point: Number = 0.0


def grid(bits: int | Tensor, *, signed: bool, narrow: bool = False, mid_rise: bool = False) -> Grid:
    """Return the grid of `bits` (1 to 8, or 16 for activations). A tensor of bits gives tensors of limits: bits per channel or per image.

    Raises:
        BitscapeError: any other bit-width (not checked for tensors, which may live on an accelerator).
    """
    if isinstance(bits, Tensor):
        return _tensor_grid(bits, signed=signed, narrow=narrow, mid_rise=mid_rise)
    if bits not in ACTIVATION_BITS:
        raise BitscapeError(f"bits = {bits}: a bit-width is an integer from 1 to 8, or 16 for activations")
    if not signed:
        return Grid(0, 2**bits - 1)
    sign_only = bits == 1
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if narrow and not (sign_only or mid_rise):
        qmin = -qmax
    return Grid(qmin, qmax, MID_RISE if mid_rise or sign_only else 0.0)


def grid_from(lowest: int, bits: int) -> Grid:
    """Return the grid of `bits` whose codes begin at `lowest`, from 1 - 2^bits to 0, so that zero is a level.

    0 gives the unsigned grid, -2^(bits - 1) the signed one: for one bit that without a zero.
    """
    if lowest in (0, -(2 ** (bits - 1))):
        return grid(bits, signed=lowest < 0)
    return Grid(lowest, lowest + 2**bits - 1)


def _tensor_grid(bits: Tensor, *, signed: bool, narrow: bool, mid_rise: bool) -> Grid:
    if not signed:
        return Grid(torch.zeros_like(bits, dtype=torch.float32), torch.exp2(bits.float()) - 1)
    half = torch.exp2(bits.float() - 1)
    shifted = torch.full_like(bits, mid_rise, dtype=torch.bool) | (bits == 1)
    qmin = torch.where(shifted, -half, 1 - half) if narrow else -half
    return Grid(qmin, half - 1, torch.where(shifted, MID_RISE, 0.0))
