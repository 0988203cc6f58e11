"""The Triton programs of programs.py, launched on a GPU.

Triton comes with builds of PyTorch for GPUs and is imported when the first tensor on one is
quantized. Where it does not work, `supports` is false and a log line says so. Nothing here waits
for the GPU.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitscape.quant import reference
from bitscape.quant.grid import Grid, Number
from bitscape.quant.kernels.rows import Rows, like, rows_of
from bitscape.quant.reference import Gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 2048
"""Elements of a program's tile at most."""
NEIGHBOURS = 32
"""Elements that follow each other in memory and are worth fetching together."""
MOST_ELEMENTS = 2**31 - TILE
"""Positions in programs.py are of 32 bits."""


@cache
def _programs() -> ModuleType:
    return importlib.import_module("bitscape.quant.kernels.programs")


@cache
def _works() -> bool:
    """Whether Triton is there and reaches the GPU; one log line where not."""
    try:
        _programs().triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Triton calls a C compiler here, which may fail in ways of its own
        logging.getLogger(__name__).info(
            "no kernels for the GPU, quantization takes longer: install triton and a C compiler (%s)",
            error,
        )
        return False
    return True


def supports(x: Tensor) -> bool:
    """Whether the kernels can work on `x`."""
    return x.is_cuda and x.dtype in DTYPES and 0 < x.numel() <= MOST_ELEMENTS and _works()


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class _Tiles:
    """How programs share the elements of a tensor; the names are those of programs.py."""

    rows: Rows
    each: int
    width: int
    count: int

    @property
    def of_channel(self) -> int:
        return -(-self.each // self.count)

    def launch(self, program: Any, x: Tensor, *arguments: Any) -> None:
        """Run a program on every tile, with `x` and further arguments."""
        rows, width = self.rows, self.width
        programs = -(-rows.channels // width) * self.of_channel
        with torch.cuda.device_of(x):  # programs run on the current device
            program[(programs,)](
                x, *arguments, rows.channels, rows.inner, self.each, width, self.count,
                enable_fp_fusion=False,
            )  # fmt: skip

    def sums(self, x: Tensor, columns: int) -> Tensor:
        """Room for `columns` sums of each channel of each tile."""
        shape = columns, self.rows.channels, self.of_channel
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def summed(self, sums: Tensor) -> Tensor:
        """Add up what `sums` holds of each channel; (columns, ...) in the tensor's axes."""
        return self.rows.in_place(sums.sum(-1))


def _tiles(rows: Rows) -> _Tiles:
    each = rows.count // rows.channels * rows.inner
    channels = _power_of_two(rows.channels)
    side_by_side = min(_power_of_two(-(-NEIGHBOURS // rows.inner)), channels)
    count = min(TILE // side_by_side, _power_of_two(each))
    return _Tiles(rows, each, min(TILE // count, channels), count)


def _numbers(rows: Rows, numbers: Sequence[Number]) -> list[Number]:
    """What programs take for each of `numbers`: a tensor with one for each channel, or a number."""
    return [
        rows.by_channel(one.unsqueeze(0)) if isinstance(one, Tensor) else float(one)
        for one in numbers
    ]


def quantized(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """As `reference.quantized`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = rows_of(x, numbers)
    y = torch.empty_like(x)
    _tiles(rows).launch(_programs().quantize, x, y, *_numbers(rows, numbers))
    return y


def quantized_backward(gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Gradients:
    """As `reference.quantized_backward`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = rows_of(x, numbers)
    tiles, passed = _tiles(rows), torch.empty_like(x)
    sums = tiles.sums(x, 2)
    program = _programs().quantize_backward
    tiles.launch(program, x, like(x, gradient), passed, *_numbers(rows, numbers), sums)
    by_scale, clipped = tiles.summed(sums)
    by_zero_point = reference.by_zero_point(lambda: -clipped * scale, grid)
    return passed, by_scale.sum_to_size(scale.shape), by_zero_point


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor:
    """As `reference.mixed`."""
    x, rows = rows_of(x, (scale[0],))
    y = torch.empty_like(x)
    _tiles(rows).launch(_programs().mix, x, y, *_mixture(rows, scale, shares, grids))
    return y


def mixed_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> Gradients:
    """As `reference.mixed_backward`."""
    x, rows = rows_of(x, (scale[0],))
    tiles, passed = _tiles(rows), torch.empty_like(x)
    sums, mixture = tiles.sums(x, 2 * len(grids)), _mixture(rows, scale, shares, grids)
    tiles.launch(_programs().mix_backward, x, like(x, gradient), passed, *mixture, sums)
    totals = tiles.summed(sums).reshape(len(grids), 2, *scale.shape[1:])
    return passed, totals[:, 0], totals[:, 1]


def _mixture(rows: Rows, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> tuple[Any, ...]:
    """What programs take of a mixture: scales, shares, and each limit of all the grids."""
    limits = [(float(one.qmin), float(one.qmax), float(one.zero_point)) for one in grids]
    return rows.by_channel(scale), shares.float().contiguous(), *zip(*limits, strict=True)
