"""How good any network is on any data: its task's numbers, added up batch by batch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitscape.calling import call, moved
from bitscape.data.epochs import Epochs, batches_in, first_of
from bitscape.data.samples import Minibatch
from bitscape.engine.feed import followed, own_part
from bitscape.engine.forward import autocast_on, check_autocast, device_of, lay_out
from bitscape.engine.metrics import Collected
from bitscape.engine.nonfinite import NonFiniteError, diagnose
from bitscape.engine.task import CLASSES, Classes, Task
from bitscape.engine.user_task import User
from bitscape.engine.workers import part, total
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32
from bitscape.models.modes import evaluating
from bitscape.progress import track
from bitscape.quant.once import weights_quantized_once

if TYPE_CHECKING:
    from bitscape.data.batches import Batches


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often, and how surely, a network is right."""

    top1: float
    """Percent of images whose largest logit is the label's."""
    top5: float
    """Percent of images whose label is among the five largest logits (all of them, below five
    classes).
    """
    loss: float
    """Mean cross entropy, in nats."""
    images: int
    """Images counted."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a network is on some data."""

    metric: str
    """Name of the number that counts, e.g. "top1"."""
    value: float
    """That number; percentages are from 0 to 100."""
    numbers: Mapping[str, float]
    """All numbers by name, the metric and the loss among them."""
    samples: int
    """Samples counted."""


def evaluate(
    model: nn.Module,
    batches: "Batches",
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool | None = None,
    together: bool = False,
) -> Accuracy:
    """Return the accuracy of `model`, in eval mode, over epoch 0 of `batches`.

    device: where to run; the model is moved there. None = where the model is.
    autocast: None or torch.bfloat16.
    channels_last: memory format of the convolutions, in which the model is left; None = as it is.
    together: of several workers (`engine.workers`), all of which must call this, each takes its
        part of every batch.
    Every module's training flag has its former value afterwards. Raises BitscapeError when there
    are no labels or no images, when a label is not below the number of the model's outputs, when
    the output is not (n, classes), when the network does not take channels_last=True, or when it
    fails on the images; NonFiniteError when outputs are NaN or infinite.
    """
    if device is not None:
        model.to(device)
    highest = highest_label(batches)
    seen = measured(
        model,
        batches,
        CLASSES,
        autocast=autocast,
        channels_last=channels_last,
        together=together,
        highest_label=highest,
    )
    return Accuracy(
        **{name: seen.numbers[name] for name in ("top1", "top5", "loss")}, images=seen.samples
    )


def measured(
    model: nn.Module,
    data: Epochs,
    task: Task,
    *,
    reference: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool | None = None,
    together: bool = False,
    highest_label: int = -1,
) -> Evaluation:
    """Return what `task` measures of `model`, in eval mode, over epoch 0 of `data`; see `evaluate`
    for the arguments.

    reference: network whose outputs take the place of the targets. highest_label: at least, of all
        targets.
    """
    check_autocast(autocast)
    check_float32(model)
    if channels_last is not None:
        lay_out(model, first_of(data).inputs, channels_last, training=False)
    tally = _Tally(
        model=model, task=task, reference=reference, autocast=autocast, highest_label=highest_label
    )
    with evaluating(model), weights_quantized_once(model):
        for own in track(_read(data, together), total=batches_in(data), label="evaluate, batch"):
            if len(own):  # a last batch may have none for this worker
                tally.add(own)
    return tally.evaluation(data, together)


def highest_label(batches: "Batches") -> int:
    """Return the largest label of the dataset; BitscapeError when it has no labels, no images or a
    label below 0.
    """
    labels = batches.dataset.labels
    if labels is None:
        raise BitscapeError("the dataset has no labels (labels=None); accuracy and loss need them")
    if len(labels) == 0:
        raise BitscapeError(f"dataset {batches.dataset.name!r} is empty; load at least one image")
    if int(labels.min()) < 0:
        raise BitscapeError(
            f"dataset {batches.dataset.name!r} has the label {int(labels.min())}; labels count "
            "from 0: drop its images"
        )
    return int(labels.max())


def known_labels(task: Task, *datasets: Any) -> int:
    """Return the highest label of classes, of data that hold all labels; -1 for others, whose labels
    are looked at batch by batch.
    """
    if not isinstance(task, Classes):
        return -1
    return max((highest_label(data) for data in datasets if hasattr(data, "dataset")), default=-1)


def _read(data: Epochs, together: bool) -> Iterator[Minibatch]:
    if not together:
        for inputs, targets in data.epoch(0):
            yield Minibatch(inputs, targets)
        return
    for number, (own, whole) in enumerate(own_part(data, 0)):
        if not number:
            part(whole)  # each worker must have something to add to the others' sums
        yield own


@dataclass(kw_only=True)
class _Tally:
    """Sums over batches."""

    model: nn.Module
    task: Task
    reference: nn.Module | None
    autocast: torch.dtype | None
    highest_label: int
    sums: list[Tensor] | None = None
    """Of the metric; loss, what it is the mean of, samples that are not finite, samples."""
    where: torch.device = field(init=False)
    collected: Any = field(init=False)
    """A metric that collects by itself, or None."""

    def __post_init__(self) -> None:
        self.where = device_of(self.model)
        metric = self.task.metric
        self.collected = metric.begun(self.where) if isinstance(metric, Collected) else None

    def add(self, own: Minibatch) -> None:
        samples, inputs = len(own), moved(own.inputs, self.where)
        highest = self.highest_label
        if self.reference is None:
            targets, of_batch = self.task.read_targets(own.targets, samples)
            targets, highest = moved(targets, self.where), max(highest, of_batch)
        else:
            targets = followed(self.reference, inputs, self.task)
        outputs = self._outputs(inputs, samples, highest)
        if self.collected is not None:
            self.collected.update(outputs, targets)
        counts = [*self._loss(outputs, targets, samples), self.task.broken(outputs).sum(), samples]
        new = [
            self.task.metric.sums(outputs, targets, samples),
            torch.stack([_float64(count, self.where) for count in counts]),
        ]
        self.sums = (
            new
            if self.sums is None
            else [before + now for before, now in zip(self.sums, new, strict=True)]
        )

    def _outputs(self, inputs: Any, samples: int, highest_label: int) -> Any:
        with autocast_on(self.where, self.autocast), explained_forward(inputs):
            output = call(self.model, inputs)
        return self.task.read(output, samples, highest_label)

    def _loss(
        self, outputs: Any, targets: Any, samples: int
    ) -> tuple[Tensor | float, Tensor | float]:
        if isinstance(self.task, User) and self.task.own_loss is None:
            return 0.0, 0.0
        weight = self.task.weight(outputs, targets, samples)
        return self.task.loss(outputs, targets).double() * weight, weight

    def evaluation(self, data: Epochs, together: bool) -> Evaluation:
        if self.sums is None:
            raise BitscapeError(
                "batches hold no image to evaluate on; check the dataset, batch_size and drop_last"
            )
        counted, counts = (total(each) if together else each for each in self.sums)
        loss, weight, broken, samples = counts.tolist()
        metric = self.task.metric
        numbers = metric.computed(self.collected) if isinstance(metric, Collected) else {}
        numbers |= metric.numbers(counted)
        if weight:
            numbers |= {"loss": loss / weight}
        if broken or not math.isfinite(numbers.get("loss", 0.0)):
            self._refuse(data, round(broken), round(samples), numbers)
        if metric.name not in numbers:
            raise BitscapeError(
                "task: there is neither a loss nor a metric; give metric=, or loss="
            )
        return Evaluation(
            metric=metric.name, value=numbers[metric.name], numbers=numbers, samples=round(samples)
        )

    def _refuse(
        self, data: Epochs, broken: int, samples: int, numbers: Mapping[str, float]
    ) -> None:
        name = getattr(getattr(data, "dataset", None), "name", "the data")
        raise NonFiniteError(
            f"model: {broken} of {samples} images of {name!r} give outputs that are not finite, "
            f"the mean loss is {numbers.get('loss', 'none')}; {self._reason(data)}; check the "
            "weights and the normalization"
        )

    def _reason(self, data: Epochs) -> str:
        """Diagnose the first batch whose outputs are not finite; where there is none, the last one."""
        try:
            with evaluating(self.model):
                for inputs, _ in data.epoch(0):
                    on_device = moved(inputs, self.where)
                    outputs = self._outputs(on_device, len(Minibatch(inputs)), self.highest_label)
                    if bool(self.task.broken(outputs).any()):
                        break
                with autocast_on(self.where, self.autocast):
                    return diagnose(self.model, on_device)
        except BitscapeError:
            return "the data cannot be read again to tell where it arises"


def _float64(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device)
