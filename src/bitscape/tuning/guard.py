"""Whether a tuned network follows the float network better than before, on images that nothing has seen."""

import logging

import torch
from torch import Tensor, nn

from bitscape.calling import call
from bitscape.data.samples import Samples
from bitscape.engine.task import Task
from bitscape.models.modes import evaluating
from bitscape.quant.once import weights_quantized_once

_log = logging.getLogger("bitscape.tuning")
_AT_ONCE = 32
"""Images that go through a network together."""


class Guard:
    """A network as it was, and how far its outputs were from the float network's."""

    def __init__(
        self, model: nn.Module, float_model: nn.Module, held_out: Samples, task: Task
    ) -> None:
        self.model, self.held_out, self.task = model, held_out, task
        self._followed = list(self._outputs(float_model))
        self._state = {name: value.clone() for name, value in model.state_dict().items()}
        self.before = self.divergence()

    def divergence(self) -> float:
        """Mean divergence of the outputs from those of the float network."""
        pairs = zip(self._outputs(self.model), self._followed, strict=True)
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

    def _outputs(self, network: nn.Module) -> list[Tensor]:
        with evaluating(network), weights_quantized_once(network):
            return [
                self.task.outputs(call(network, batch.inputs), len(batch))
                for batch in self.held_out.batches(_AT_ONCE)
            ]
