"""Plain: one forward, one backward.

Paper     none; the ordinary step of stochastic gradient descent.
Idea      The gradient of the batch's loss at the current weights.
Computes  loss, gradient
Departs   nothing
Costs     one forward and one backward pass a step.
Measured  docs/results: qat-cifar10.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from bitscape.engine import BatchLoss, StepRecord
from bitscape.engine.step import count_correct


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The ordinary step: one pass."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        """Leave the gradient of `loss` at the current weights in `.grad`."""
        logits = model(images)
        value = loss(logits, labels)
        value.backward()
        return StepRecord(loss=value.detach(), correct=count_correct(logits, labels))
