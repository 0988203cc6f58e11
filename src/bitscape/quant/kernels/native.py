"""The kernels of kernels.c, called through ctypes.

The library is built with the package (hatch_build.py) and needs nothing of torch or Python, so that
one file serves every version of both. Where it is missing, `supports` is false and a log line says so.
"""

import ctypes
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitscape.quant import reference
from bitscape.quant.grid import Grid, Number
from bitscape.quant.reference import Gradients

FILE = Path(__file__).with_name("kernels.so")
DTYPES = (torch.float32, torch.bfloat16)
MOST_WIDTHS = 32
"""Of a mixture, as in kernels.c."""
ELEMENTS_PER_THREAD = 1 << 18
"""Fewer are not worth starting a thread for: about 0.1 ms of work."""

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_NUMBER = ctypes.c_int
_LAYOUT = [_NUMBER, _COUNT, _COUNT, _COUNT]
_MIXTURE = [_POINTER, _POINTER, _NUMBER]
_SIGNATURES = {
    "bitscape_units": ([_COUNT, _COUNT], _COUNT),
    "bitscape_quantize": ([_POINTER] * 2 + [*_LAYOUT, _POINTER, _NUMBER], None),
    "bitscape_quantize_backward": ([_POINTER] * 3 + [*_LAYOUT, _POINTER, _POINTER, _NUMBER], None),
    "bitscape_mix": ([_POINTER] * 2 + [*_LAYOUT, *_MIXTURE, _NUMBER], None),
    "bitscape_mix_backward": ([_POINTER] * 3 + [*_LAYOUT, *_MIXTURE, _POINTER, _NUMBER], None),
}


@cache
def _functions() -> Mapping[str, Any]:
    """The library's functions; none, and one log line, where it was not built or does not load."""
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        logging.getLogger(__name__).info(
            "no native kernels, quantization takes longer: install a C compiler, then bitscape again (%s)",
            error,
        )
        return {}
    functions = {name: getattr(library, name) for name in _SIGNATURES}
    for name, (arguments, result) in _SIGNATURES.items():
        functions[name].argtypes, functions[name].restype = arguments, result
    return functions


def supports(x: Tensor) -> bool:
    """Whether the kernels can work on `x`."""
    return x.dtype in DTYPES and x.device.type == "cpu" and x.numel() > 0 and bool(_functions())


@dataclass(frozen=True)
class _Rows:
    """How the elements of a tensor lie in memory, and which of them share a grid.

    Elements that follow each other and share a grid are a row of `inner` elements; the grids of
    the rows repeat after `channels` rows.
    """

    axes: tuple[int, ...]
    """The tensor's axes, from the slowest in memory."""
    shape: tuple[int, ...]
    """Sizes of these axes."""
    differing: slice
    """Those of these axes along which grids differ."""

    @property
    def channels(self) -> int:
        return math.prod(self.shape[self.differing])

    @property
    def inner(self) -> int:
        return math.prod(self.shape[self.differing.stop :])

    @property
    def count(self) -> int:
        return math.prod(self.shape[: self.differing.stop])

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Sizes of the axes; 1 along those on which grids do not depend."""
        at = self.differing
        return tuple(n if at.start <= axis < at.stop else 1 for axis, n in enumerate(self.shape))

    def table(self, numbers: Sequence[Number]) -> Any:
        """Numbers of the grids as kernels.c takes them: float32 (numbers, channels)."""
        if self.channels == 1:
            plain = (one.item() if isinstance(one, Tensor) else one for one in numbers)
            return (ctypes.c_float * len(numbers))(*plain)
        return torch.stack([self._by_channel(one) for one in numbers])

    def _by_channel(self, values: Number) -> Tensor:
        values = torch.as_tensor(values, dtype=torch.float32)
        full = values[(None,) * (len(self.axes) - values.ndim)].permute(self.axes)
        return full.expand(self.kept).reshape(-1)

    def sums(self, columns: int) -> Tensor:
        """Room for `columns` sums of every unit of work."""
        units: int = _functions()["bitscape_units"](self.count, self.inner)
        return torch.empty(units, columns, dtype=torch.float64)

    def summed(self, sums: Tensor) -> Tensor:
        """Add up what `sums` (units, columns) holds of each channel; (columns, ...) in the tensor's axes."""
        units, columns = sums.shape
        if self.channels == 1:
            return sums.sum(0).reshape(columns, *[1] * len(self.axes))
        totals = sums.reshape(-1, self.channels, units // self.count, columns).sum((0, 2)).T
        back = [1 + self.axes.index(axis) for axis in range(len(self.axes))]
        return totals.reshape(columns, *self.kept).permute(0, *back)


@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, stride: tuple[int, ...], sizes: torch.Size) -> _Rows | None:
    """How a tensor's elements lie, if they fill one block of memory; `sizes` are those of the grids."""
    axes = tuple(sorted(range(len(shape)), key=lambda axis: (-stride[axis], axis)))
    expected = 1
    for axis in reversed(axes):
        if shape[axis] > 1 and stride[axis] != expected:
            return None
        expected *= shape[axis]
    padded = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
    differing = [at for at, axis in enumerate(axes) if padded[axis] > 1]
    span = slice(differing[0], differing[-1] + 1) if differing else slice(0, 0)
    return _Rows(axes, tuple(shape[axis] for axis in axes), span)


def _rows(x: Tensor, numbers: Sequence[Number]) -> tuple[Tensor, _Rows]:
    """`x`, copied if its elements do not fill one block of memory, and its rows."""
    shapes = [one.shape for one in numbers if isinstance(one, Tensor) and one.numel() > 1]
    sizes = torch.broadcast_shapes(*shapes) if len(shapes) > 1 else (*shapes, torch.Size())[0]
    rows = _layout(x.shape, x.stride(), sizes)
    if rows is None:
        x = x.contiguous()
        rows = _layout(x.shape, x.stride(), sizes)
        assert rows is not None
    return x, rows


def _like(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the layout and type of `x`."""
    same = gradient.stride() == x.stride() and gradient.dtype == x.dtype
    return gradient if same else torch.empty_like(x).copy_(gradient)


def _run(name: str, tensors: Sequence[Tensor], rows: _Rows, *rest: Any) -> None:
    """Call a kernel: tensors of the data's shape, their layout, then grids and what else it takes."""
    x = tensors[0]
    threads = min(torch.get_num_threads(), 1 + x.numel() // ELEMENTS_PER_THREAD)
    layout = (x.dtype == torch.bfloat16, rows.count, rows.channels, rows.inner)
    arguments = (*tensors, *layout, *rest, threads)
    _functions()[name](*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def quantized(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """As `reference.quantized`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = _rows(x, numbers)
    y = torch.empty_like(x)
    _run("bitscape_quantize", (x, y), rows, rows.table(numbers))
    return y


def quantized_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid
) -> Gradients:
    """As `reference.quantized_backward`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = _rows(x, numbers)
    passed, sums = torch.empty_like(x), rows.sums(2)
    tensors = (x, _like(x, gradient), passed)
    _run("bitscape_quantize_backward", tensors, rows, rows.table(numbers), sums)
    totals = rows.summed(sums)
    by_scale = totals[0].sum_to_size(scale.shape).float()
    return passed, by_scale, reference.by_zero_point(lambda: -totals[1] * scale, grid)


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor:
    """As `reference.mixed`."""
    x, rows = _rows(x, (scale[0],))
    y = torch.empty_like(x)
    _run("bitscape_mix", (x, y), rows, *_mixture(rows, scale, shares, grids))
    return y


def mixed_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> Gradients:
    """As `reference.mixed_backward`."""
    x, rows = _rows(x, (scale[0],))
    passed, sums = torch.empty_like(x), rows.sums(2 * len(grids))
    tensors, mixture = (x, _like(x, gradient), passed), _mixture(rows, scale, shares, grids)
    _run("bitscape_mix_backward", tensors, rows, *mixture, sums)
    sums = rows.summed(sums).reshape(len(grids), 2, *scale.shape[1:]).float()
    return passed, sums[:, 0], sums[:, 1]


def _mixture(rows: _Rows, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> tuple[Any, Tensor, int]:
    """What the mixture kernels take beside the data: grids, shares and the number of candidates."""
    numbers = [(one, grid.qmin, grid.qmax, grid.zero_point) for one, grid in zip(scale, grids, strict=True)]
    return rows.table([*itertools.chain(*numbers)]), shares.contiguous(), len(grids)
