"""What both ways of tuning share: batches, and how far a layer is off."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bitscape.calling import Inputs
from bitscape.data.epochs import AS_READ, Rows
from bitscape.data.samples import Samples

EXAMPLE = 32
"""Samples that show how large outputs are."""


def relative_error(output: Tensor, expected: Tensor) -> Tensor:
    """Mean squared difference over the variance of what is expected."""
    power = expected.var().clamp(min=torch.finfo(expected.dtype).tiny)
    return (output - expected).square().mean() / power


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Samples of one shape or several, in batches of one shape, in another order in every epoch."""

    samples: Samples
    batch_size: int
    seed: int

    @cached_property
    def _parts(self) -> list[Rows]:
        return [
            Rows(data=part, reader=AS_READ, batch_size=self.batch_size, seed=self.seed)
            for part in self.samples.parts
        ]

    def __len__(self) -> int:
        """Batches of one epoch."""
        return sum(map(len, self._parts))

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Inputs, Any]]:
        """See `Epochs`."""
        for part in self._parts:
            yield from part.epoch(number, start=min(start, len(part)))
            start = max(start - len(part), 0)
