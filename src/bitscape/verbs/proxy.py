"""The few samples of the user's data that a search, a calibration or an export looks at."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitscape.data.reading import BatchReader, read_samples
from bitscape.data.samples import Samples
from bitscape.engine.forward import device_of
from bitscape.errors import BitscapeError
from bitscape.words import counted

HELD_OUT = 4
"""One sample of so many is held out."""


def proxy_of(
    model: nn.Module,
    data: Any,
    *,
    count: int,
    inputs: Callable[[Any], Any] | None,
    targets: Callable[[Any], Any] | None = None,
    seed: int,
) -> Samples:
    """Return up to `count` samples of `data`, on the model's device.

    Raises BitscapeError for data that cannot be read.
    """
    return read_samples(data, BatchReader.of(model, inputs, targets), count=count, seed=seed).to(device_of(model))


def parted(samples: Samples) -> tuple[Samples, Samples]:
    """Part every fourth sample from the others: (three quarters, the quarter held out).

    Raises BitscapeError for fewer than
    four samples.
    """
    if len(samples) < HELD_OUT:
        raise BitscapeError(
            f"data: {counted(len(samples), 'sample')}; give at least {HELD_OUT}, of which a "
            "quarter is measured on, or pass evaluation="
        )
    others, held_out, before = [], [], 0
    for part in samples.parts:
        held = torch.arange(before, before + len(part)) % HELD_OUT == HELD_OUT - 1
        others.append(part.rows(~held))
        held_out.append(part.rows(held))
        before += len(part)
    return Samples(others), Samples(held_out)
