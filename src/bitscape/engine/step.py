"""What the loop and a training step say to each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, classes), labels (n,)) -> scalar loss, averaged over the batch."""


class LossFunction(Protocol):
    """A loss; `for_batch` lets it do once what several passes over one batch share, such as a teacher's logits."""

    def for_batch(self, images: Tensor) -> BatchLoss:
        """Return the loss of the batch `images` (n, c, h, w)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy: the loop's own loss when none is given."""

    def for_batch(self, images: Tensor) -> BatchLoss:
        """Return plain cross entropy, whatever the images."""
        return functional.cross_entropy


@dataclass(frozen=True)
class StepRecord:
    """What one step saw. Tensors stay on the device: the loop reads them every few seconds, not every step."""

    loss: Tensor
    """Scalar, detached: the mean loss of the batch at the unperturbed weights."""
    correct: Tensor
    """Scalar count of images whose largest logit is the label's."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further scalars; the epoch's record holds the mean of each."""


class Step(Protocol):
    """Forward and backward of one batch, in one pass or several.

    On entry every `.grad` is None and the model is in training mode. On return `.grad` holds the gradient to descend
    along and all weights have their entry values. Each call `model(images)` runs under the loop's autocast and its
    compiled forward, if any, and returns float32 logits; `backward` belongs outside autocast and is so by itself.

    Of several workers each calls its step on its own part of the batch, and the loop averages `.grad` afterwards: a step that
    perturbs weights does so along its own worker's gradient. What steps must agree on goes through `engine.workers`.

    A step that keeps something between batches has `state_dict() -> dict[str, Tensor]` and
    `load_state_dict(dict[str, Tensor])`; the loop stores it in the checkpoint.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        """Leave the gradient of the batch in `.grad` and report the loss."""
        ...


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many rows of logits (n, classes) have their maximum at the label (n,), as a scalar tensor."""
    return (logits.detach().argmax(1) == labels).sum()


def step_state(step: Step) -> dict[str, Tensor]:
    """Return the tensors that a step keeps between batches; {} for a step without state."""
    read = getattr(step, "state_dict", None)
    return {name: torch.as_tensor(value) for name, value in read().items()} if callable(read) else {}


def restore_step(step: Step, state: Mapping[str, Tensor]) -> None:
    """Give a step with state back what `step_state` returned."""
    restore = getattr(step, "load_state_dict", None)
    if callable(restore):
        restore(dict(state))
