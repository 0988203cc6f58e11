"""The kernels of kernels.c, called through ctypes.

The library is built with the package (hatch_build.py) and needs nothing of torch or Python, so that
one file serves every version of both. Where it is missing, `supports` is false and a log line says
so.
"""

import ctypes
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitscape.quant import reference
from bitscape.quant.grid import Grid, Number
from bitscape.quant.kernels.rows import Rows, like, rows_of
from bitscape.quant.reference import Gradients

FILE = Path(__file__).with_name("kernels.so")
DTYPES = (torch.float32, torch.bfloat16)
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
        _check_source(library)
    except OSError as error:
        logging.getLogger(__name__).info(
            "no native kernels, quantization is slow: install a C compiler, then bitscape again (%s)",
            error,
        )
        return {}
    functions = {name: getattr(library, name) for name in _SIGNATURES}
    for name, (arguments, result) in _SIGNATURES.items():
        functions[name].argtypes, functions[name].restype = arguments, result
    return functions


def _check_source(library: ctypes.CDLL) -> None:
    """Raise OSError for a library that was built from another kernels.c: its arguments may differ."""
    built_from = getattr(library, "bitscape_source", None)
    if built_from is not None:
        built_from.restype = ctypes.c_char_p
    present = hashlib.sha256(FILE.with_suffix(".c").read_bytes()).hexdigest()
    if built_from is None or built_from() != present.encode():
        raise OSError(f"{FILE.name} was built from another version of kernels.c")


def supports(x: Tensor) -> bool:
    """Whether the kernels can work on `x`."""
    return x.dtype in DTYPES and x.device.type == "cpu" and x.numel() > 0 and bool(_functions())


def _table(rows: Rows, numbers: Sequence[Number]) -> Any:
    """Numbers of the grids as kernels.c takes them: float32 (numbers, channels)."""
    if rows.channels == 1:
        plain = (one.item() if isinstance(one, Tensor) else one for one in numbers)
        return (ctypes.c_float * len(numbers))(*plain)
    return torch.cat([rows.by_channel(torch.as_tensor(one).unsqueeze(0)) for one in numbers])


def _sums(rows: Rows, columns: int) -> Tensor:
    """Room for `columns` sums of every unit of work."""
    units: int = _functions()["bitscape_units"](rows.count, rows.inner)
    return torch.empty(units, columns, dtype=torch.float64)


def _summed(rows: Rows, sums: Tensor) -> Tensor:
    """Add up what `sums` (units, columns) holds of each channel; (columns, ...) in the tensor's axes."""
    units, columns = sums.shape
    by_channel = sums.reshape(-1, rows.channels, units // rows.count, columns).sum((0, 2))
    return rows.in_place(by_channel.T)


def _run(name: str, tensors: Sequence[Tensor], rows: Rows, *rest: Any) -> None:
    """Call a kernel: tensors of the data's shape, their layout, then grids and what else it takes."""
    x = tensors[0]
    threads = min(torch.get_num_threads(), 1 + x.numel() // ELEMENTS_PER_THREAD)
    layout = (x.dtype == torch.bfloat16, rows.count, rows.channels, rows.inner)
    arguments = (*tensors, *layout, *rest, threads)
    _functions()[name](*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def quantized(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """As `reference.quantized`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = rows_of(x, numbers)
    y = torch.empty_like(x)
    _run("bitscape_quantize", (x, y), rows, _table(rows, numbers))
    return y


def quantized_backward(gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Gradients:
    """As `reference.quantized_backward`."""
    numbers = (scale, grid.qmin, grid.qmax, grid.zero_point)
    x, rows = rows_of(x, numbers)
    passed, sums = torch.empty_like(x), _sums(rows, 2)
    tensors = (x, like(x, gradient), passed)
    _run("bitscape_quantize_backward", tensors, rows, _table(rows, numbers), sums)
    totals = _summed(rows, sums)
    by_scale = totals[0].sum_to_size(scale.shape).float()
    return passed, by_scale, reference.by_zero_point(lambda: -totals[1] * scale, grid)


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor:
    """As `reference.mixed`."""
    x, rows = rows_of(x, (scale[0],))
    y = torch.empty_like(x)
    _run("bitscape_mix", (x, y), rows, *_mixture(rows, scale, shares, grids))
    return y


def mixed_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> Gradients:
    """As `reference.mixed_backward`."""
    x, rows = rows_of(x, (scale[0],))
    passed, sums = torch.empty_like(x), _sums(rows, 2 * len(grids))
    tensors, mixture = (x, like(x, gradient), passed), _mixture(rows, scale, shares, grids)
    _run("bitscape_mix_backward", tensors, rows, *mixture, sums)
    sums = _summed(rows, sums).reshape(len(grids), 2, *scale.shape[1:]).float()
    return passed, sums[:, 0], sums[:, 1]


def _mixture(
    rows: Rows, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> tuple[Any, Tensor, int]:
    """What the mixture kernels take beside the data: grids, shares and the number of candidates."""
    numbers = [
        (one, grid.qmin, grid.qmax, grid.zero_point) for one, grid in zip(scale, grids, strict=True)
    ]
    return _table(rows, [*itertools.chain(*numbers)]), shares.float().contiguous(), len(grids)
