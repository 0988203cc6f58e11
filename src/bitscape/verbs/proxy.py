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
"""One sample of so many is held out, by default."""


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


def parted(samples: Samples, every: int = HELD_OUT) -> tuple[Samples, Samples]:
    """Part one of every few samples from the others: (the others, those held out).

    Which one is drawn, the same for as many samples: in data whose classes take turns, every fourth
    would be of the same few classes.

    Raises BitscapeError for fewer than `every` samples.
    """
    if len(samples) < every:
        raise BitscapeError(
            f"data: {counted(len(samples), 'sample')}; give at least {every}, of which one in "
            f"{every} is measured on, or pass evaluation="
        )
    rounds = len(samples) // every
    drawn = torch.randint(every, (rounds,), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(samples), dtype=torch.bool)
    held[every * torch.arange(rounds) + drawn] = True
    others, held_out = [], []
    for part, rows in zip(samples.parts, held.split([*map(len, samples.parts)]), strict=True):
        others.append(part.rows(~rows))
        held_out.append(part.rows(rows))
    return Samples(others), Samples(held_out)
