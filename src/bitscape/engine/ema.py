"""Running average of a network's state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitscape.models.find import load_state


@dataclass
class Ema:
    """Exponential moving average of all floating-point state; whole numbers (counters, flags) are copied."""

    decay: float
    values: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, decay: float) -> "Ema":
        """Start an average at the current state of `model`."""
        return cls(decay, {name: value.clone() for name, value in model.state_dict().items()})

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the state after `step` (from 0); early steps count more, so that the start is soon forgotten."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, share)
            else:
                self.values[name].copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averaged state inside the block, and its own back afterwards, bit for bit."""
        own = {name: value.clone() for name, value in model.state_dict().items()}
        load_state(model, self.values)
        try:
            yield
        finally:
            load_state(model, own)
