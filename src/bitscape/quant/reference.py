"""The definition of fake-quantization and of mixtures of widths, forward and backward, in PyTorch.

`operators.py` offers these functions as operators of PyTorch, which faster kernels compute. Kernels
give the same values, but for the sign of zeros, and add up in another order. Values of less than float32 are widened
first, and results have the type of the values.

Arguments, throughout:
    x: values of any shape.
    scale: positive float32, broadcasts against `x`; for mixtures one for each candidate, (R, ...).
    grid: integer limits and zero point, numbers or tensors that broadcast against `x`. The grids of a
        mixture hold numbers.
    shares: of a mixture's candidates, float32 (R,).
    gradient: of the loss by the result, shaped as `x`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bitscape.quant.grid import Grid, Number

EDGE = 1e-6
"""Relative width by which a bound is moved outwards, a few units in the last place, so that repaired
weights, which lie on it, count as inside."""
HALF = (torch.bfloat16, torch.float16)


Gradients = tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class Arithmetic(Protocol):
    """What computes the functions of this module."""

    def quantized(self, x: Tensor, scale: Tensor, grid: Grid) -> Tensor: ...

    def quantized_backward(
        self, gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid
    ) -> Gradients: ...

    def mixed(self, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor: ...

    def mixed_backward(
        self, gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
    ) -> Gradients: ...


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if its type has less; otherwise `x` itself."""
    return x.float() if x.dtype in HALF else x


def quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Codes q in qmin..qmax of `x`, as floats: round(clip(x / scale + zero_point))."""
    codes = x / scale
    if is_shifted(grid.zero_point):
        codes = codes.add_(grid.zero_point)
    return clamp_(codes, grid.qmin, grid.qmax).round_()


def dequantize(codes: Tensor, scale: Tensor, zero_point: Number = 0.0) -> Tensor:
    """Real values scale * (q - zero_point) of float `codes`."""
    return (codes - zero_point) * scale if is_shifted(zero_point) else codes * scale


def is_shifted(zero_point: Number) -> bool:
    """Whether codes differ from levels; of a tensor it is assumed."""
    return isinstance(zero_point, Tensor) or zero_point != 0.0


def clamp_(x: Tensor, low: Number, high: Number) -> Tensor:
    """Limit `x` in place to low .. high, numbers or tensors that broadcast against it."""
    return x.clamp_(low, high)  # type: ignore[arg-type]  # both numbers or both tensors


def quantized(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest values of the grid."""
    wide = widened(x)
    return dequantize(quantize(wide, scale, grid), scale, grid.zero_point).to(x.dtype)


def quantized_backward(gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Gradients:
    """Gradients of `quantized` (Esser et al., ICLR 2020, Eq. 3 and 5).

    Returns:
        The gradient of `x`: `gradient` inside the grid's range, 0 outside.
        The gradient of `scale`, in its shape: `gradient` times the level outside the range,
        times the level less x / scale inside, added up.
        The gradient of a zero point that is a tensor, in its shape: -scale times `gradient` outside
        the range, added up. Of one that is a number, 0.
    """
    wide, upstream = widened(x), widened(gradient)
    inside, level, distance = _placed(wide, scale, grid)
    passed = torch.where(inside, upstream, 0.0)
    by_scale = (upstream * (level - distance)).float().sum_to_size(scale.shape)
    return passed.to(x.dtype), by_scale, by_zero_point(lambda: (passed - upstream) * scale, grid)


def by_zero_point(values: Callable[[], Tensor], grid: Grid) -> Tensor:
    """`values` in float32, added up to the shape of a zero point that is a tensor; else 0."""
    if isinstance(grid.zero_point, Tensor):
        return values().float().sum_to_size(grid.zero_point.shape)
    return torch.zeros(())


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Sum over candidates i of shares[i] * quantized(x, scale[i], grids[i])."""
    wide, total = widened(x), None
    for one, share, grid in zip(scale, shares, grids, strict=True):
        part = dequantize(quantize(wide, one, grid), one * share, grid.zero_point)
        total = part if total is None else total + part
    assert total is not None
    return total.to(x.dtype)


def mixed_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> Gradients:
    """Gradients of `mixed`, by candidate.

    Returns:
        The gradient of `x`.
        Each candidate's gradient by its scale, before its share is multiplied, in the shape of `scale`.
        The sum of `gradient` times the candidate's level, in the shape of `scale`.
    """
    wide, upstream = widened(x), widened(gradient)
    passed, by_scale, by_level = None, [], []
    for one, share, grid in zip(scale, shares, grids, strict=True):
        inside, level, distance = _placed(wide, one, grid)
        part = torch.where(inside, upstream, 0.0) * share
        passed = part if passed is None else passed + part
        by_scale.append((upstream * (level - distance)).float().sum_to_size(one.shape))
        by_level.append((upstream * level).float().sum_to_size(one.shape))
    assert passed is not None
    return passed.to(x.dtype), torch.stack(by_scale), torch.stack(by_level)


@torch.no_grad()
def _placed(x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Where `x` lies: whether inside the range; its level, code - zero_point; x / scale if inside, else 0."""
    low, high = (grid.qmin - grid.zero_point) * scale, (grid.qmax - grid.zero_point) * scale
    inside = (x >= low - EDGE * low.abs()) & (x <= high + EDGE * high.abs())
    level = quantize(x, scale, grid)
    if is_shifted(grid.zero_point):
        level = level.sub_(grid.zero_point)
    return inside, level, torch.where(inside, x / scale, 0.0)
