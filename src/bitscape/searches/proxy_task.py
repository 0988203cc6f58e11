"""What a network learns while its bits are searched: the proxy's labels, by its own or a new classifier, or its own float outputs."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bitscape.engine import AdamW, Batch, BatchLoss, LossFunction, StepRecord, train
from bitscape.engine.step import CrossEntropy
from bitscape.engine.task import Classes
from bitscape.engine.task import Task as Outputs
from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.models.replace import replace_module
from bitscape.searches.problem import SearchProblem, only_tensor

_log = logging.getLogger("bitscape.searches")

Task = Literal["auto", "labels", "new-head", "follow"]
HEAD_RATE = 0.01
"""Learning rate of a new classifier's warm-up, with Adam, which takes features of any size."""


@dataclass(frozen=True, eq=False)
class ProxyData:
    """Normalized proxy images, and a label for each."""

    name: str
    images: Tensor
    """Float32, (n, c, h, w)."""
    labels: Tensor
    """Int64, (n,); what the float network decides where no label is learned."""


@dataclass(frozen=True, kw_only=True)
class ProxyBatches:
    """Shuffled batches of proxy images for the training loop; batch i of epoch e depends on (seed, e, i) alone."""

    dataset: ProxyData
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return max(1, len(self.dataset.labels) // self.batch_size)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of epoch `number` from batch `start`; a smaller last batch is left out."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**32)
        order = torch.randperm(len(self.dataset.labels), generator=generator)
        for batch in range(start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.dataset.images[rows], self.dataset.labels[rows]


@dataclass(frozen=True)
class FollowFloat:
    """The task's divergence from the float network's outputs: learning without labels, on any images."""

    teacher: nn.Module
    task: Outputs = field(default_factory=Classes)

    def for_batch(self, images: Tensor) -> BatchLoss:
        """Run the float network once on `images` (n, c, h, w)."""
        with evaluating(self.teacher):
            aim = self.task.outputs(self.teacher(images), len(images))
        return lambda outputs, _: self.task.divergence(self.task.outputs(outputs, len(images)), aim).mean()


@dataclass(frozen=True, kw_only=True)
class ProxyTask:
    """A float network and what it learns of the proxy."""

    name: Literal["labels", "new-head", "follow"]
    model: nn.Module
    """A copy of the prepared network, perhaps with a new classifier."""
    batches: ProxyBatches
    loss: LossFunction = field(default_factory=CrossEntropy)

    def split(self, held_out: float) -> "tuple[ProxyTask, ProxyTask | None]":
        """Keep the share `held_out` of the images apart, drawn by the seed; all in the first part, and no second, for 0."""
        if not held_out:
            return self, None
        data = self.batches.dataset
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(self.batches.seed))
        cut = round(len(order) * held_out)
        if not 0 < cut < len(order):
            raise BitscapeError(f"held_out = {held_out} of {len(order)} images leaves nothing on one side; give more images, or 0.5")
        return self._on(order[cut:]), self._on(order[:cut])

    def _on(self, rows: Tensor) -> "ProxyTask":
        data = self.batches.dataset
        return replace(self, batches=replace(self.batches, dataset=ProxyData(data.name, data.images[rows], data.labels[rows])))


def proxy_task(problem: SearchProblem, task: Task, *, batch_size: int, head_epochs: int, folder: Path | None) -> ProxyTask:
    """State what is learned of the problem's proxy; a new classifier is warmed up first, on the float network as it is.

    "auto" learns the labels where the float network predicts them at least twice as often as the most frequent one would be right, or
    errs at most half as often; by a new classifier where it does not, and the float network's outputs where there are no labels.
    Raises BitscapeError for a task that needs labels when there are none.
    """
    name = _resolved(problem) if task == "auto" else task
    if problem.labels is None and name != "follow":
        raise BitscapeError(f"task={name!r} learns labels, and the problem has none; give labels, or task='follow'")
    model = copy.deepcopy(problem.prepared)
    images = only_tensor(problem.samples)
    labels = problem.decisions(problem.samples) if name == "follow" else problem.labels
    assert labels is not None, "checked above"
    batches = ProxyBatches(
        dataset=ProxyData("proxy", images, labels.to(images.device)), batch_size=batch_size, seed=problem.seed
    )
    if name == "follow":
        return ProxyTask(name="follow", model=model, batches=batches, loss=FollowFloat(problem.prepared, problem.meaning))
    if name == "new-head":
        _warm_up(model, problem, batches, head_epochs, folder)
    return ProxyTask(name=name, model=model, batches=batches)


def _resolved(problem: SearchProblem) -> Literal["labels", "new-head", "follow"]:
    if problem.labels is None or problem.meaning.name != "classes":
        return "follow"
    right = int((problem.decisions(problem.samples) == problem.labels).sum())
    most_frequent = int(problem.labels.bincount().max())
    own = right >= min(2 * most_frequent, (len(problem.labels) + most_frequent) / 2)  # the second for few classes
    _log.info(
        "the float network predicts %d of %d proxy labels: %s",
        *(right, len(problem.labels)),
        "they are its own classes" if own else "they are other classes, it gets a new classifier",
    )
    return "labels" if own else "new-head"


def _warm_up(model: nn.Module, problem: SearchProblem, batches: ProxyBatches, epochs: int, folder: Path | None) -> None:
    name = problem.network.ends[-1]
    old = quantizable_layers(model)[name]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(problem.seed)  # no GPU's random state is touched
        head = new_head(name, old, int(batches.dataset.labels.max()) + 1)
    replace_module(model, old, head)
    model.requires_grad_(False)
    head.requires_grad_(True)
    _log.info("warming the new classifier up, epochs: %d", epochs)
    train(
        model,
        batches,
        step=_HeadStep(),
        optimizer=AdamW(lr=HEAD_RATE, weight_decay=0.0),
        epochs=epochs,
        channels_last=problem.channels_last,
        folder=None if folder is None else folder / "head",
        seed=problem.seed,
    )
    model.requires_grad_(True)


def new_head(name: str, old: nn.Module, classes: int) -> nn.Module:
    """Return an untrained layer like `old`, the network's last one, with `classes` outputs."""
    like = old.get_parameter("weight")
    bias = getattr(old, "bias", None) is not None
    if isinstance(old, nn.Linear):
        made: nn.Module = nn.Linear(old.in_features, classes, bias)
    elif isinstance(old, nn.Conv2d) and old.groups == 1:
        sizes = old.kernel_size, old.stride, old.padding, old.dilation
        made = nn.Conv2d(old.in_channels, classes, *sizes, bias=bias)  # type: ignore[arg-type]  # sizes are pairs
    else:
        raise BitscapeError(f"layer {name}: a {type(old).__name__} at the end cannot be replaced by a new classifier; use task='follow'")
    return made.to(like)


@dataclass(frozen=True)
class _HeadStep:
    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        model.eval()  # else the frozen network's norms and dropout would not be those that the classifier is for
        return batch.backward(model)
