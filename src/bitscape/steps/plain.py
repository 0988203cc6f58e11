"""Plain: one forward, one backward.

Paper     none; the ordinary step of stochastic gradient descent.
Idea      The gradient of the batch's loss at the current weights.
Computes  loss, gradient
Departs   nothing
Costs     one forward and one backward pass a step.
Measured  docs/results: qat-cifar10.
"""

from dataclasses import dataclass

from torch import nn

from bitscape.engine import Batch, StepRecord


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The ordinary step: one pass."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient of the loss at the current weights in `.grad`."""
        return batch.backward(model)
