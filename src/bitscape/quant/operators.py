"""The operators `bitscape::quantize` and `bitscape::mix`, and those of their gradients.

They compute what `reference.py` defines, by the fastest kernel for the tensor at hand. As operators
of PyTorch they work on fake tensors and stay in graphs that are traced without being compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitscape.quant import reference
from bitscape.quant.grid import Grid, Number
from bitscape.quant.kernels import gpu, native
from bitscape.quant.reference import Arithmetic, Gradients

_LIBRARY = torch.library.Library("bitscape", "FRAGMENT")


def quantized(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """`reference.quantized`."""
    kind, limits = _limits(x, grid)
    return getattr(torch.ops.bitscape.quantize, kind)(x, scale, *limits)  # type: ignore[no-any-return]  # operators are untyped


def quantized_backward(gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Gradients:
    """`reference.quantized_backward`."""
    kind, limits = _limits(x, grid)
    return getattr(torch.ops.bitscape.quantize_backward, kind)(gradient, x, scale, *limits)  # type: ignore[no-any-return]  # as above


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]) -> Tensor:
    """`reference.mixed`; the grids hold numbers."""
    return torch.ops.bitscape.mix.default(x, scale, shares, *_columns(grids))  # type: ignore[no-any-return]  # as above


def mixed_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid]
) -> Gradients:
    """`reference.mixed_backward`; the grids hold numbers."""
    return torch.ops.bitscape.mix_backward.default(gradient, x, scale, shares, *_columns(grids))  # type: ignore[no-any-return]  # as above


def _limits(x: Tensor, grid: Grid) -> tuple[str, tuple[Number, Number, Number]]:
    """The overload for the grid's limits and zero point, and these: numbers, or all of them tensors."""
    limits = grid.qmin, grid.qmax, grid.zero_point
    if not any(isinstance(one, Tensor) for one in limits):
        return "default", limits
    qmin, qmax, zero_point = (_tensor(x, one) for one in limits)
    return "tensors", (qmin, qmax, zero_point)


def _tensor(x: Tensor, number: Number) -> Tensor:
    """In float32; a number is filled in on the device of `x`, for which nothing has to wait."""
    if isinstance(number, Tensor):
        return number.float()
    return torch.full((), number, dtype=torch.float32, device=x.device)


def _columns(grids: Sequence[Grid]) -> tuple[list[float], ...]:
    rows = [(float(grid.qmin), float(grid.qmax), float(grid.zero_point)) for grid in grids]
    return tuple(map(list, zip(*rows, strict=True)))


def _kernels(x: Tensor) -> Arithmetic:
    """The fastest that can work on `x`."""
    if native.supports(x):
        return native
    return gpu if gpu.supports(x) else reference


def _quantize(x: Tensor, scale: Tensor, *limits: Number) -> Tensor:
    return _kernels(x).quantized(x, scale, Grid(*limits))


def _quantize_backward(gradient: Tensor, x: Tensor, scale: Tensor, *limits: Number) -> Gradients:
    return _kernels(x).quantized_backward(gradient, x, scale, Grid(*limits))


def _mix(x: Tensor, scale: Tensor, shares: Tensor, *columns: list[float]) -> Tensor:
    return _kernels(x).mixed(x, scale, shares, [Grid(*row) for row in zip(*columns, strict=True)])


def _mix_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, shares: Tensor, *columns: list[float]
) -> Gradients:
    grids = [Grid(*row) for row in zip(*columns, strict=True)]
    return _kernels(x).mixed_backward(gradient, x, scale, shares, grids)


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitscape::{name}", fake, lib=_LIBRARY)


def _fake_quantize_backward(_: Tensor, x: Tensor, scale: Tensor, *limits: Number) -> Gradients:
    zero_point = limits[-1] if isinstance(limits[-1], Tensor) else torch.zeros(())
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)


def _fake_mix_backward(_: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> Gradients:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


for _kind, _type in {"": "float", ".tensors": "Tensor"}.items():
    _grid = f"Tensor scale, {_type} qmin, {_type} qmax, {_type} zero_point"
    _define(
        f"quantize{_kind}(Tensor x, {_grid}) -> Tensor",
        _quantize,
        lambda x, *_: torch.empty_like(x),
    )
    _define(
        f"quantize_backward{_kind}(Tensor gradient, Tensor x, {_grid}) -> (Tensor, Tensor, Tensor)",
        _quantize_backward,
        _fake_quantize_backward,
    )
_mixture = "Tensor scale, Tensor shares, float[] qmin, float[] qmax, float[] zero_point"
_define(f"mix(Tensor x, {_mixture}) -> Tensor", _mix, lambda x, *_: torch.empty_like(x))
_define(
    f"mix_backward(Tensor gradient, Tensor x, {_mixture}) -> (Tensor, Tensor, Tensor)",
    _mix_backward,
    _fake_mix_backward,
)
