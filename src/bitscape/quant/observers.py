"""From observed values to a scale: min-max, percentile and mean squared error.

Values come as a (groups, n) tensor: one row for each scale. Every observer is a frozen setting with one function, `scale(values, grid)`.
The grid's limits are numbers, or tensors with one value for each group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.quant.functional import MINIMUM_SCALE, fake_quantize, power_of_two
from bitscape.quant.grid import Grid, Number
from bitscape.quant.reference import quantize


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """The smallest scale whose range holds every value."""

    def scale(self, values: Float[Tensor, "groups n"], grid: Grid) -> Float[Tensor, " groups"]:
        grid = _by_group(grid, len(values))
        return _scale_to_hold(values.amin(1, keepdim=True), values.amax(1, keepdim=True), grid)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """The smallest scale whose range holds all but the outermost values."""

    percent: float = 99.9
    """Share of the values held at each end, in percent; above 50, at most 100."""

    def __post_init__(self) -> None:
        if not 50.0 < self.percent <= 100.0:
            raise BitscapeError(f"percent = {self.percent}: allowed is above 50 and at most 100; 99.9 is usual")

    def scale(self, values: Float[Tensor, "groups n"], grid: Grid) -> Float[Tensor, " groups"]:
        ordered = values.sort(dim=1).values
        last = values.shape[1] - 1
        high = round(self.percent / 100 * last)
        grid = _by_group(grid, len(values))
        return _scale_to_hold(ordered[:, [last - high]], ordered[:, [high]], grid)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Mse:
    """The scale with the smallest squared error: a coarse scan, then least squares with the codes held fixed."""

    points: int = 20
    """Scales tried between a tenth of the min-max scale and the min-max scale."""
    refinements: int = 3
    """Least-squares steps after the scan."""

    def scale(self, values: Float[Tensor, "groups n"], grid: Grid) -> Float[Tensor, " groups"]:
        widest, grid = MinMax().scale(values, grid), _by_group(grid, len(values))
        unit = power_of_two(widest)  # errors are squared, and those of small values must not vanish
        values, widest = values / unit[:, None], widest / unit
        best, best_error = widest, _squared_error(values, widest, grid)
        for fraction in torch.linspace(0.1, 0.96, self.points).tolist():
            best, best_error = _better(values, widest * fraction, grid, best, best_error)
        for _ in range(self.refinements):
            levels = quantize(values, best[:, None], grid) - grid.zero_point
            fitted = (values * levels).sum(1) / levels.square().sum(1).clamp(min=1e-12)
            best, best_error = _better(values, fitted, grid, best, best_error)
        return (best * unit).clamp(min=MINIMUM_SCALE)


Observer = MinMax | Percentile | Mse


def _scale_to_hold(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    # A negative value on an unsigned grid cannot be held by any scale: there the upper end alone decides.
    top, bottom = (torch.as_tensor(reach).to(low) for reach in (grid.qmax - grid.zero_point, grid.qmin - grid.zero_point))
    below = torch.where(bottom < 0, low / torch.where(bottom < 0, bottom, -1.0), 0.0)
    return torch.maximum(high / top, below).clamp(min=MINIMUM_SCALE)


def _by_group(grid: Grid, groups: int) -> Grid:
    """The grid with limits that broadcast against (groups, n)."""
    return Grid(*(_column(limit, groups) for limit in (grid.qmin, grid.qmax, grid.zero_point)))


def _column(limit: Number, groups: int) -> Number:
    if not isinstance(limit, Tensor) or limit.numel() == 1:
        return limit if not isinstance(limit, Tensor) else limit.reshape(())
    if limit.numel() != groups:
        raise BitscapeError(f"bits: {limit.numel()} widths for {groups} scales; ranges need one width, or one for each scale")
    return limit.reshape(-1, 1)


def _squared_error(values: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    restored = fake_quantize(values, scale[:, None], grid)
    return restored.sub_(values).square_().sum(1)


def _better(values: Tensor, scale: Tensor, grid: Grid, best: Tensor, best_error: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale.clamp(min=MINIMUM_SCALE)
    error = _squared_error(values, scale, grid)
    improved = error < best_error
    return torch.where(improved, scale, best), torch.where(improved, error, best_error)
