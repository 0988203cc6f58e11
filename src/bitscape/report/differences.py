"""95 % intervals: of the mean of paired differences by Student's t, of a share by Wilson."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import norm as normal
from scipy.stats import t as student

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and where it may lie."""

    mean: float
    """Arithmetic mean."""
    half: float | None
    """Half the width of the 95 % interval; None for a single pair, which has none."""
    n: int
    """Number of pairs."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)

    @property
    def is_seen(self) -> bool:
        """Whether there is an interval, and zero is not in it."""
        return self.half is not None and abs(self.mean) > self.half


def mean_difference(values: Sequence[float]) -> Difference:
    """Summarize the differences of one or more pairs: mean ± t(0.975, n - 1) * s / sqrt(n)."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Difference(mean, None, n)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Difference(mean, quantile * statistics.stdev(values) / sqrt(n), n)


def smallest_seen(values: Sequence[float]) -> float:
    """The smallest true difference whose interval would leave zero out in 80 % of cases, at the spread of two or more pairs.

    (t(0.975, n - 1) + t(0.8, n - 1)) * s / sqrt(n), the usual approximation of the power of a paired t test.
    """
    n = len(values)
    quantiles = student.ppf([(1 + CONFIDENCE) / 2, POWER], n - 1)
    return float(quantiles.sum()) * statistics.stdev(values) / sqrt(n)


def difference(values: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % interval, in words where the interval holds zero."""
    found = mean_difference(values)
    if found.interval is None:
        return f"{found.mean:+.2f}, one pair: no interval"
    low, high = found.interval
    verdict = "" if found.is_seen else ", no difference seen"
    return f"{found.mean:+.2f} [{low:+.2f}, {high:+.2f}]{verdict}"


def share_interval(percent: float, samples: int) -> tuple[float, float]:
    """Return the ends, in percent, of the 95 % interval of a share of independent samples.

    Wilson: Journal of the American Statistical Association 22 (1927), p. 209.
    """
    share, z = percent / 100, float(normal.ppf((1 + CONFIDENCE) / 2))
    middle = share + z * z / (2 * samples)
    half = z * sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    low, high = ((middle + side * half) / (1 + z * z / samples) for side in (-1, 1))
    return 100 * low, 100 * high
