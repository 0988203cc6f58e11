"""How the elements of a tensor lie in memory, and which of them share a grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from bitscape.quant.grid import Number


@dataclass(frozen=True)
class Rows:
    """Elements that follow each other and share a grid are a row of `inner` elements; the grids of
    the rows repeat after `channels` rows.
    """

    axes: tuple[int, ...]
    """The tensor's axes, from the slowest in memory."""
    shape: tuple[int, ...]
    """Sizes of these axes."""
    differing: slice
    """Those of these axes along which grids differ."""

    @cached_property
    def channels(self) -> int:
        return math.prod(self.shape[self.differing])

    @cached_property
    def inner(self) -> int:
        return math.prod(self.shape[self.differing.stop :])

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape[: self.differing.stop])

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Sizes of the axes; 1 along those on which grids do not depend."""
        at = self.differing
        return tuple(n if at.start <= axis < at.stop else 1 for axis, n in enumerate(self.shape))

    def by_channel(self, values: Tensor) -> Tensor:
        """`values` (columns, ...), each of which broadcasts against the tensor, as float32
        (columns, channels), contiguous."""
        columns, *sizes = values.shape
        if self.channels == 1:
            return values.float().reshape(columns, 1).contiguous()
        aligned = values.float().reshape(columns, *[1] * (len(self.axes) - len(sizes)), *sizes)
        full = aligned.permute(0, *(1 + axis for axis in self.axes))
        return full.expand(columns, *self.kept).reshape(columns, self.channels).contiguous()

    def in_place(self, totals: Tensor) -> Tensor:
        """`totals` (columns, channels) with the channels along the tensor's axes."""
        if self.channels == 1:
            return totals.reshape(len(totals), *self.kept)
        back = [1 + self.axes.index(axis) for axis in range(len(self.axes))]
        return totals.reshape(len(totals), *self.kept).permute(0, *back)


@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, stride: tuple[int, ...], sizes: torch.Size) -> Rows | None:
    """How a tensor's elements lie, if they fill one block of memory; the grids have `sizes`."""
    axes = tuple(sorted(range(len(shape)), key=lambda axis: (-stride[axis], axis)))
    expected = 1
    for axis in reversed(axes):
        if shape[axis] > 1 and stride[axis] != expected:
            return None
        expected *= shape[axis]
    padded = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
    differing = [at for at, axis in enumerate(axes) if padded[axis] > 1]
    span = slice(differing[0], differing[-1] + 1) if differing else slice(0, 0)
    return Rows(axes, tuple(shape[axis] for axis in axes), span)


def rows_of(x: Tensor, numbers: Sequence[Number]) -> tuple[Tensor, Rows]:
    """`x`, copied if its elements do not fill one block of memory, and its rows.

    Numbers of the grids that are tensors broadcast against `x`.
    """
    shapes = [one.shape for one in numbers if isinstance(one, Tensor) and one.numel() > 1]
    sizes = torch.broadcast_shapes(*shapes) if len(shapes) > 1 else (*shapes, torch.Size())[0]
    if torch.broadcast_shapes(x.shape, sizes) != x.shape:
        raise ValueError(
            f"scale, grid: of shape {tuple(sizes)}, which does not broadcast to that of x, {tuple(x.shape)}"
        )
    rows = _layout(x.shape, x.stride(), sizes)
    if rows is None:
        x = torch.empty_like(x).copy_(x)
        rows = _layout(x.shape, x.stride(), sizes)
        assert rows is not None
    return x, rows


def like(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the layout and type of `x`."""
    same = gradient.stride() == x.stride() and gradient.dtype == x.dtype
    return gradient if same else torch.empty_like(x).copy_(gradient)
