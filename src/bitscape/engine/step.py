"""What the loop and a training step say to each other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.calling import Inputs, call, map_tensors, sample_count
from bitscape.data.samples import Minibatch
from bitscape.engine import workers
from bitscape.engine.task import CLASSES, Task
from bitscape.engine.user_task import loss_of
from bitscape.errors import explained_backward
from bitscape.quant.once import weights_quantized_once
from bitscape.sharpness.probe import BatchLoss


@runtime_checkable
class LossFunction(Protocol):
    """A loss; `for_batch` lets it do once what several passes over one batch share, such as a teacher's logits."""

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Return the loss of the batch `inputs`, e.g. images (n, c, h, w)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy."""

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Return plain cross entropy, whatever the inputs."""
        return functional.cross_entropy


@dataclass(frozen=True)
class TaskLoss:
    """What a task learns: the loop's own loss when none is given."""

    task: Task

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Return the task's loss, whatever the inputs."""
        return self.task.loss


@dataclass(frozen=True)
class OwnLoss:
    """The user's function (outputs, targets) -> loss, a scalar or one value for each sample."""

    function: Callable[[Any, Any], Any]

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Return the mean of what the function returns, whatever the inputs."""
        return lambda outputs, targets: loss_of(self.function, outputs, targets).mean()


@dataclass(frozen=True)
class StepRecord:
    """What one step saw. Tensors stay on the device: the loop reads them every few seconds, not every step."""

    loss: Tensor
    """Scalar, detached: the mean loss of the batch at the unperturbed weights."""
    sums: Tensor
    """What the task's metric adds up, see `Part.counted`; for classes images right, right among five, and all."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further scalars, the same names on every worker; the epoch's record holds the mean of each."""


@dataclass(frozen=True)
class Part:
    """Samples of a batch that go through the network together."""

    inputs: Inputs
    """What the network is called with: a tensor (n, ...), a tuple of arguments or a mapping of keywords."""
    targets: Any
    """What the loss compares the outputs with, e.g. labels (n,)."""
    loss: BatchLoss
    """Mean over these samples."""
    share: float
    """Of the batch's samples; the shares of all parts add up to 1."""
    task: Task = CLASSES
    """What the outputs mean."""

    def __len__(self) -> int:
        return sample_count(self.inputs)

    def outputs(self, model: nn.Module) -> Any:
        """Run the model."""
        return call(model, self.inputs)

    @torch.no_grad()
    def counted(self, outputs: Any) -> Tensor:
        """Return what the task's metric adds up for these outputs."""
        detached = outputs.detach() if isinstance(outputs, Tensor) else map_tensors(Tensor.detach, outputs)
        return self.task.metric.sums(detached, self.targets, len(self))


@dataclass(frozen=True)
class Batch:
    """What one step learns from: a single part, or several whose gradients add up where memory is short.

    Of several workers all have the same number of parts.
    """

    parts: tuple[Part, ...]
    progress: float = 0.0
    """Share of the run's steps that are done before this batch; of its epochs, for data whose length is not known."""

    @classmethod
    def of(
        cls, inputs: Inputs, targets: Any, loss: LossFunction, parts: int = 1, progress: float = 0.0, task: Task = CLASSES
    ) -> "Batch":
        """Cut inputs and targets (n, ...) into `parts`, or n if that is less; what passes share of the loss is done here."""
        whole = Minibatch(inputs, targets)
        pieces = torch.arange(len(whole)).tensor_split(min(parts, len(whole)))
        cut = [whole] if len(pieces) == 1 else [whole.rows(slice(int(rows[0]), int(rows[-1]) + 1)) for rows in pieces]
        return cls(
            tuple(Part(each.inputs, each.targets, loss.for_batch(each.inputs), len(each) / len(whole), task) for each in cut),
            progress,
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def backward(self, model: nn.Module) -> StepRecord:
        """Run forward and backward of every part: `.grad` gains the gradient of the batch's mean loss."""
        with weights_quantized_once(model) if len(self.parts) > 1 else nullcontext():
            return sum_of([self._of_part(model, part) for part in self.parts])

    @explained_backward()
    def _of_part(self, model: nn.Module, part: Part) -> StepRecord:
        outputs = part.outputs(model)
        value = part.loss(outputs, part.targets) * part.share
        value.backward()
        return StepRecord(loss=value.detach(), sums=part.counted(outputs))


@runtime_checkable
class Step(Protocol):
    """Forward and backward of one batch, in one pass or several.

    On entry every `.grad` is None and the model is in training mode. On return `.grad` holds the gradient to descend
    along and all weights have their entry values. A step that perturbs weights does so by the gradient of all parts of the
    batch. Each call `part.outputs(model)` runs under the loop's autocast and its compiled forward, if any, and returns what the
    loss takes, e.g. float32 logits; `backward` belongs outside autocast and is so by itself.

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


@runtime_checkable
class StepSettings(Protocol):
    """Settings of a step that keeps something between batches."""

    def build(self) -> Step:
        """Return a step for one run."""
        ...


def least_part(model: nn.Module) -> int:
    """Return the fewest samples of a part: two where norms take their statistics from it, which a single pixel does not have."""
    return 2 if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()) else 1


def sum_of(records: Sequence[StepRecord]) -> StepRecord:
    """Return the record of a batch from those of its parts, in which loss and extras are multiplied by the part's share."""
    if len(records) == 1:
        return records[0]
    extras = {name: torch.stack([record.extras[name] for record in records]).sum() for name in records[0].extras}
    loss = torch.stack([record.loss for record in records]).sum()
    return StepRecord(loss=loss, sums=torch.stack([record.sums for record in records]).sum(0), extras=extras)


def pooled(record: StepRecord, share: float) -> StepRecord:
    """Return the record of the whole batch, of which this worker saw `share`; alone, the record itself.

    Also tells every worker of a loss that is not finite on one.
    """
    if workers.world_size() == 1:
        return record
    names = sorted(record.extras)
    means = torch.stack([value.detach().to(record.loss.device).double() for value in (record.loss, *(record.extras[n] for n in names))])
    total = workers.total(torch.cat([share * means, record.sums.to(means).flatten()]))
    loss, *extras = total[: len(means)].unbind()
    return StepRecord(loss=loss, sums=total[len(means) :], extras=dict(zip(names, extras, strict=True)))


def step_state(step: Step) -> dict[str, Tensor]:
    """Return the tensors that a step keeps between batches; {} for a step without state."""
    read = getattr(step, "state_dict", None)
    return {name: torch.as_tensor(value) for name, value in read().items()} if callable(read) else {}


def restore_step(step: Step, state: Mapping[str, Tensor]) -> None:
    """Give a step with state back what `step_state` returned."""
    restore = getattr(step, "load_state_dict", None)
    if callable(restore):
        restore(dict(state))
