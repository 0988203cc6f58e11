"""Whether a tuned network follows the float network better than before, on images that nothing has seen."""

import logging

import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.engine.following import outputs_on
from bitscape.engine.task import Task

_log = logging.getLogger("bitscape.tuning")


class Guard:
    """A network as it was, and how far its outputs were from the float network's."""

    def __init__(
        self, model: nn.Module, float_model: nn.Module, held_out: Samples, task: Task
    ) -> None:
        self.model, self.held_out, self.task = model, held_out, task
        self._followed = outputs_on(float_model, held_out, task)
        self._state = {name: value.clone() for name, value in model.state_dict().items()}
        self.before = self.divergence()

    def divergence(self) -> float:
        """Mean divergence of the outputs from those of the float network."""
        pairs = zip(
            outputs_on(self.model, self.held_out, self.task), self._followed, strict=True
        )
        divergences = [self.task.divergence(outputs, followed) for outputs, followed in pairs]
        return float(torch.cat(divergences).double().mean())

    def decide(self, what: str) -> None:
        """Put the network back as it was unless it has come closer."""
        after = self.divergence()
        kept = after < self.before
        if not kept:
            self.model.load_state_dict(self._state)
        _log.info(
            "%s: divergence on %d images held out %.4g -> %.4g, %s",
            *(what, len(self.held_out), self.before, after, "kept" if kept else "taken back"),
        )
