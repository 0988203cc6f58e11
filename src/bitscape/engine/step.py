"""What the loop and a training step say to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.engine import workers
from bitscape.sharpness.probe import BatchLoss


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


@dataclass(frozen=True)
class Part:
    """Images of a batch that go through the network together."""

    images: Tensor
    """(n, c, h, w)."""
    labels: Tensor
    """(n,)."""
    loss: BatchLoss
    """Mean over these images."""
    share: float
    """Of the batch's images; the shares of all parts add up to 1."""


@dataclass(frozen=True)
class Batch:
    """What one step learns from: a single part, or several whose gradients add up where memory is short.

    Of several workers all have the same number of parts.
    """

    parts: tuple[Part, ...]
    progress: float = 0.0
    """Share of the run's steps that are done before this batch."""

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, loss: LossFunction, parts: int = 1, progress: float = 0.0) -> "Batch":
        """Cut `images` (n, c, h, w) and `labels` (n,) into `parts`, or n if that is less; what passes share of the loss is done here."""
        pieces = min(parts, len(images))
        cut = zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
        return cls(tuple(Part(x, y, loss.for_batch(x), len(x) / len(images)) for x, y in cut), progress)

    def __len__(self) -> int:
        return sum(len(part.images) for part in self.parts)

    def backward(self, model: nn.Module) -> StepRecord:
        """Run forward and backward of every part: `.grad` gains the gradient of the batch's mean loss."""
        return sum_of([self._of_part(model, part) for part in self.parts])

    def _of_part(self, model: nn.Module, part: Part) -> StepRecord:
        logits = model(part.images)
        value = part.loss(logits, part.labels) * part.share
        value.backward()
        return StepRecord(loss=value.detach(), correct=count_correct(logits, part.labels))


class Step(Protocol):
    """Forward and backward of one batch, in one pass or several.

    On entry every `.grad` is None and the model is in training mode. On return `.grad` holds the gradient to descend
    along and all weights have their entry values. A step that perturbs weights does so by the gradient of all parts of the
    batch. Each call `model(images)` runs under the loop's autocast and its compiled forward, if any, and returns float32
    logits; `backward` belongs outside autocast and is so by itself.

    Of several workers each calls its step on its own part of the batch, and the loop averages `.grad` afterwards. A step that
    perturbs weights so does it along its own worker's gradient, as m-sharpness is defined (Foret et al., arXiv 2010.01412, section 4.1).
    It restores them from a copy: (w + e) - e is not w, and e is another one on each worker. What workers must agree on, such as a
    radius, goes through `engine.workers.mean` or `total`; norms see the worker's part of the batch; the first worker's state is stored.

    A step that keeps something between batches is given as `StepSettings`, so that every run has its own. It has
    `state_dict() -> dict[str, Tensor]` and `load_state_dict(dict[str, Tensor])`; the loop stores the state in the checkpoint.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient of the batch in `.grad` and report the loss."""
        ...


class StepSettings(Protocol):
    """Settings of a step that keeps something between batches."""

    def build(self) -> Step:
        """Return a step for one run."""
        ...


def least_part(model: nn.Module) -> int:
    """Return the fewest images of a part: two where norms take their statistics from it, which a single pixel does not have."""
    return 2 if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()) else 1


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many rows of logits (n, classes) have their maximum at the label (n,), as a scalar tensor."""
    return (logits.detach().argmax(1) == labels).sum()


def sum_of(records: Sequence[StepRecord]) -> StepRecord:
    """Return the record of a batch from those of its parts, in which loss and extras are multiplied by the part's share."""
    if len(records) == 1:
        return records[0]
    extras = {name: torch.stack([record.extras[name] for record in records]).sum() for name in records[0].extras}
    loss, correct = (torch.stack([getattr(record, name) for record in records]).sum() for name in ("loss", "correct"))
    return StepRecord(loss=loss, correct=correct, extras=extras)


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
