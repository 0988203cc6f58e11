"""From observed values to a scale: min-max, percentile and mean squared error.

Values come as a (groups, n) tensor: one row for each scale. Every observer is a frozen setting with two functions:
`scale(values, grid)`, where the grid's limits are numbers, or tensors with one value for each group; and
`lowest(values, bits)`, where a grid of free zero point begins for one row of values. `activation_range` decides between
grids by the squared error.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.quant.functional import MINIMUM_SCALE, fake_quantize, power_of_two
from bitscape.quant.grid import Grid, Number, grid, grid_from
from bitscape.quant.reference import quantize

SHIFT_PAYS = 0.75
"""A signed grid is given up for one with another zero point where that has at most this share of its squared error. A
whole bit is 0.25; values about symmetric, as of normalized images, keep their plain zero."""
ORDERED = 1 << 12
"""Values that the search for a zero point looks at."""


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """The smallest scale whose range holds every value."""

    def scale(self, values: Float[Tensor, "groups n"], grid: Grid) -> Float[Tensor, " groups"]:
        grid = _by_group(grid, len(values))
        return _scale_to_hold(values.amin(1, keepdim=True), values.amax(1, keepdim=True), grid)[:, 0]

    def lowest(self, values: Float[Tensor, " n"], bits: int) -> int:
        """The smallest code of the grid whose ends are nearest to the values' ends."""
        return _lowest_between(*values.aminmax(), bits)


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

    def lowest(self, values: Float[Tensor, " n"], bits: int) -> int:
        """The smallest code of the grid whose ends are nearest to those of the values held."""
        ordered, last = values.sort().values, len(values) - 1
        high = round(self.percent / 100 * last)
        return _lowest_between(ordered[last - high], ordered[high], bits)


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

    def lowest(self, values: Float[Tensor, " n"], bits: int) -> int:
        """The smallest code of the grid of least squared error: for every scale of the scan, all zero points at once."""
        ordered, (low, high) = _Ordered(values), values.aminmax()
        spread = max(float(high.clamp(min=0) - low.clamp(max=0)), MINIMUM_SCALE)
        scales = (torch.linspace(0.1, 1.0, self.points) * (spread / (2**bits - 1))).tolist()
        return min(ordered.best_lowest(scale, bits) for scale in scales)[1]


Observer = MinMax | Percentile | Mse


def activation_range(
    values: Float[Tensor, " n"], bits: int | Tensor, observer: Observer, *, zero_points: bool = True
) -> tuple[Float[Tensor, ""], Grid]:
    """Return scale and grid of a sample of activations; zero is a level of the grid, but for signs of one bit.

    The grid is unsigned where no value is below zero. Else it is signed, or of the `observer`'s zero point where that
    leaves at most SHIFT_PAYS of the squared error. Without `zero_points`, and of several widths (a tensor of bits), it is
    signed.
    """
    row, below = values.reshape(1, -1), bool(values.min() < 0)
    plain = grid(bits, signed=below)
    scale = observer.scale(row, plain)
    if below and zero_points and not isinstance(bits, Tensor):
        shifted = grid_from(observer.lowest(values, bits), bits)
        shifted_scale = observer.scale(row, shifted)
        unit = power_of_two(values.abs().max())
        error, shifted_error = (
            _squared_error(row / unit, spacing / unit, levels)
            for spacing, levels in ((scale, plain), (shifted_scale, shifted))
        )
        if shifted_error < SHIFT_PAYS * error:
            return shifted_scale[0], shifted
    return scale[0], plain


class _Ordered:
    """A sample in order, and sums over its first values: the error of every zero point takes a look-up.

    Neighbours that make one of ORDERED equal parts stand for their mean: the places of a grid's ends hardly differ.
    """

    def __init__(self, values: Float[Tensor, " n"]) -> None:
        ordered = values.sort().values.double()
        parts = ordered.split(-(-len(ordered) // ORDERED))
        whole = torch.stack(parts[:-1]).mean(1) if len(parts) > 1 else ordered.new_empty(0)
        self.values = torch.cat([whole, parts[-1].mean()[None]])
        self._sum, self._squares = _sums(self.values), _sums(self.values.square())

    def best_lowest(self, scale: float, bits: int) -> tuple[float, int]:
        """The least squared error of the grids of this scale that hold zero, and the smallest code of that grid."""
        codes = (self.values / scale).round_()
        inside = _sums((self.values - scale * codes).square_())
        least = max(1 - 2**bits, min(int(codes[0]), 0))  # no value needs a smaller one
        lowest = torch.arange(least, 1, dtype=torch.float64, device=codes.device)
        highest = lowest + (2**bits - 1)
        first, stop = torch.searchsorted(codes, lowest), torch.searchsorted(codes, highest, right=True)
        error = inside[stop] - inside[first]
        error += self._to(scale * lowest, first) + self._to(scale * highest, stop, above=True)
        best = int(error.argmin())
        return float(error[best]), int(lowest[best])

    def _to(self, end: Tensor, index: Tensor, *, above: bool = False) -> Tensor:
        """Squared distances to `end` of the first `index` values, or of the others, added up."""
        total, squares, count = self._sum[index], self._squares[index], index.double()
        if above:
            total, squares, count = self._sum[-1] - total, self._squares[-1] - squares, len(self.values) - count
        return squares - 2 * end * total + end.square() * count


def _sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _lowest_between(low: Tensor, high: Tensor, bits: int) -> int:
    bottom, top = min(float(low), 0.0), max(float(high), 0.0)
    spread = max(top - bottom, MINIMUM_SCALE)
    top_code: int = 2**bits - 1
    return round(bottom / spread * top_code)


def _scale_to_hold(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    # A value beyond an end that is zero cannot be held by any scale: there the other end alone decides.
    top, bottom = (torch.as_tensor(reach).to(low) for reach in (grid.qmax - grid.zero_point, grid.qmin - grid.zero_point))
    above = torch.where(top > 0, high / torch.where(top > 0, top, 1.0), 0.0)
    below = torch.where(bottom < 0, low / torch.where(bottom < 0, bottom, -1.0), 0.0)
    return torch.maximum(above, below).clamp(min=MINIMUM_SCALE)


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
