"""What the loop and a training step say to each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.engine import workers

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
    """Further scalars, the same names on every worker; the epoch's record holds the mean of each."""


class Step(Protocol):
    """Forward and backward of one batch, in one pass or several.

    On entry every `.grad` is None and the model is in training mode. On return `.grad` holds the gradient to descend
    along and all weights have their entry values. Each call `model(images)` runs under the loop's autocast and its
    compiled forward, if any, and returns float32 logits; `backward` belongs outside autocast and is so by itself.

    Of several workers each calls its step on its own part of the batch, and the loop averages `.grad` afterwards. A step that
    perturbs weights so does it along its own worker's gradient, as m-sharpness is defined (Foret et al., arXiv 2010.01412, section 4.1).
    It restores them from a copy: (w + e) - e is not w, and e is another one on each worker. What workers must agree on, such as a
    radius, goes through `engine.workers.mean` or `total`; norms see the worker's part of the batch; the first worker's state is stored.

    A step that keeps something between batches has `state_dict() -> dict[str, Tensor]` and
    `load_state_dict(dict[str, Tensor])`; the loop stores it in the checkpoint.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        """Leave the gradient of the batch in `.grad` and report the loss."""
        ...


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many rows of logits (n, classes) have their maximum at the label (n,), as a scalar tensor."""
    return (logits.detach().argmax(1) == labels).sum()


def pooled(record: StepRecord, share: float) -> StepRecord:
    """Return the record of the whole batch, of which this worker saw `share`; alone, the record itself.

    Also tells every worker of a loss that is not finite on one.
    """
    if workers.world_size() == 1:
        return record
    names = sorted(record.extras)
    means = torch.stack([value.detach().to(record.loss.device).double() for value in (record.loss, *(record.extras[n] for n in names))])
    loss, *extras, correct = workers.total(torch.cat([share * means, record.correct.double().view(1)])).unbind()
    return StepRecord(loss=loss, correct=correct, extras=dict(zip(names, extras, strict=True)))


def step_state(step: Step) -> dict[str, Tensor]:
    """Return the tensors that a step keeps between batches; {} for a step without state."""
    read = getattr(step, "state_dict", None)
    return {name: torch.as_tensor(value) for name, value in read().items()} if callable(read) else {}


def restore_step(step: Step, state: Mapping[str, Tensor]) -> None:
    """Give a step with state back what `step_state` returned."""
    restore = getattr(step, "load_state_dict", None)
    if callable(restore):
        restore(dict(state))
