"""What quantizing does to the values of one tensor, added up part by part: noise, range, outliers.

    SQNR      10 log10(sum x^2 / sum (Q(x) - x)^2), in dB; one more bit adds about 6
    kurtosis  mean (x - mean)^4 / variance^2: 1.8 of a uniform distribution, 3 of a normal one;
              far above, few values take up most of the range
    clipped   share of the values more than half a step beyond the grid's ends: rounding leaves
              less than that

Sums are exact over all values. Percentiles and the histogram are those of a sample of bounded size
(`ValueSample`), so memory does not grow with the number of batches.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.quant.quantizers import FakeQuantizer
from bitscape.quant.quantizers.base import WeightFakeQuantizer
from bitscape.quant.reference import widened
from bitscape.quant.samples import SAMPLES_PER_BATCH, ValueSample

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
"""In percent, of `TensorNoise.percentiles`."""
BINS = 64
"""Of a histogram."""
PART = 1 << 16
"""Values summed at once in float32; their sums are added up in float64."""
DRAWS = 8
"""Parts of a batch, of each of which `ValueSample` draws."""
FAR = 1e30
"""Beyond every grid."""
EQUAL = 1e-12
"""Values whose variance is less than this share of their mean square are equal but for rounding."""


@dataclass(frozen=True, kw_only=True)
class TensorNoise:
    """The values of one tensor, and what quantizing does to them."""

    bits: int
    """Bit-width."""
    sqnr_db: float | None
    """Signal to quantization noise, in dB; None without noise."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    percentiles: tuple[float, ...]
    """Values at `PERCENTILES`."""
    std: float
    """Standard deviation."""
    kurtosis: float | None
    """Of the distribution; None where all values are equal."""
    clip_min: float
    """Lower end of the grid; of a weight, that of the channel that reaches lowest."""
    clip_max: float
    """Upper end of the grid; of a weight, that of the channel that reaches highest."""
    clipped: float
    """Share of the values, 0 to 1, more than half a step beyond the grid's ends."""
    histogram: tuple[int, ...]
    """Sampled values in each of `BINS` equal steps from `low` to `high`."""


class NoiseMeter:
    """Adds up what one quantizer does to its values."""

    def __init__(self, quantizer: nn.Module) -> None:
        self._quantizer = cast(FakeQuantizer, quantizer)
        self._count, self._clipped = 0, 0
        self._sums: Tensor | None = None
        self._shift = torch.zeros(())
        self._ends = (0.0, 0.0)
        self._sample = ValueSample()

    @torch.no_grad()
    def add(self, values: Tensor, quantized: Tensor) -> None:
        """Take in float values of any shape, a batch of activations or a whole weight, and what
        they become.
        """
        wide = widened(values.detach())
        if self._sums is None:
            # Powers of values near their mean keep their digits.
            self._shift = wide.mean()
        sums = _sums(wide, widened(quantized), self._shift)
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += wide.numel()
        self._add_clipped(wide)
        for part in wide.flatten().split(max(SAMPLES_PER_BATCH, -(-wide.numel() // DRAWS))):
            self._sample.add(part)

    def result(self) -> TensorNoise:
        """Return the figures of all values so far, at least one.

        Raises:
            BitscapeError: values that are not finite, or whose fourth powers in float32 are not.
        """
        assert self._sums is not None, "no values were added"
        signal, noise, *powers = self._sums.tolist()
        if not all(map(math.isfinite, (signal, noise, *powers))):
            raise BitscapeError(
                "values, or their fourth powers in float32, are not finite; check the checkpoint "
                "and the normalization of the samples"
            )
        variance, kurtosis = _moments([power / self._count for power in powers])
        *_, low, high = self._sample.values().tolist()
        seen = self._sample.values()[:-2]  # the extremes, which it ends with, are in it already
        return TensorNoise(
            bits=int(cast(int, self._quantizer.bits)),
            sqnr_db=decibels(signal, noise),
            low=low,
            high=high,
            percentiles=tuple(np.percentile(seen.cpu().numpy(), PERCENTILES).tolist()),
            std=math.sqrt(variance),
            kurtosis=kurtosis,
            clip_min=self._ends[0],
            clip_max=self._ends[1],
            clipped=self._clipped / self._count,
            histogram=tuple(int(n) for n in seen.histc(BINS, low, high).tolist()),
        )

    def _add_clipped(self, values: Tensor) -> None:
        laid, low, high = _on_grid(self._quantizer, values)
        half_step = (high - low) / (2 ** cast(int, self._quantizer.bits) - 1) / 2
        beyond = (laid < low - half_step) | (laid > high + half_step)
        self._clipped += int(beyond.count_nonzero())
        self._ends = float(low.min()), float(high.max())


def decibels(signal: float, noise: float) -> float | None:
    """Return the ratio of two sums of squares in dB; None without noise or without a signal."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def energy(values: Tensor) -> float:
    """Return the sum of squares of float32 `values`."""
    parts = [part.dot(part) for part in values.flatten().split(PART)]
    return float(torch.stack(parts).sum(dtype=torch.float64))


def _sums(values: Tensor, quantized: Tensor, shift: Tensor) -> Tensor:
    """Sums of x^2, of squared noise, and of the first four powers of x - shift, float64 (6,)."""
    sums = []
    parts = (tensor.flatten().split(PART) for tensor in (values, quantized))
    for exact, on_grid in zip(*parts, strict=True):
        noise, centered = on_grid - exact, exact - shift
        squares = centered.square()
        pairs = ((exact, exact), (noise, noise), (centered, squares), (squares, squares))
        signal, error, cubes, fourths = (one.dot(other) for one, other in pairs)
        sums.append(torch.stack([signal, error, centered.sum(), squares.sum(), cubes, fourths]))
    return torch.stack(sums).sum(0, dtype=torch.float64)


def _moments(means: list[float]) -> tuple[float, float | None]:
    """Variance and kurtosis by the means of the first four powers of x less any constant."""
    first, second, third, fourth = means
    variance = max(second - first**2, 0.0)
    if variance <= EQUAL * second:
        return variance, None
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return variance, central / variance**2


def _on_grid(quantizer: FakeQuantizer, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is laid on the grid, and the grid's lower and upper end, which broadcast against it."""
    if isinstance(quantizer, WeightFakeQuantizer):
        scale, grid = quantizer.grid_scale(values), quantizer.grid
        low, high = ((end - grid.zero_point) * scale for end in (grid.qmin, grid.qmax))
        return quantizer.transform(values), low, high
    low, high = quantizer(values.new_tensor([-FAR, FAR]))
    return values, low, high
