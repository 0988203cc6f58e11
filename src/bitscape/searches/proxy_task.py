"""What a network learns while its bits are searched: the targets of the proxy, by its own or a new classifier, or its own float outputs."""

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bitscape.calling import call, moved
from bitscape.data.epochs import AS_READ, Rows
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine import AdamW, Batch, LossFunction, StepRecord, train
from bitscape.engine.following import FollowFloat
from bitscape.engine.forward import device_of
from bitscape.engine.outputs import spreads_of
from bitscape.engine.step import Part, TaskLoss
from bitscape.engine.task import CLASSES, SAMPLE, Classes, Follow, Task
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError, explained_forward, first_line
from bitscape.models.layers import quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.models.replace import replace_module
from bitscape.searches.problem import SearchProblem, inputs_alone, whole_batch

_log = logging.getLogger("bitscape.searches")

Learned = Literal["auto", "labels", "new-head", "follow"]
HEAD_RATE = 0.01
"""Learning rate of a new classifier's warm-up, with Adam, which takes features of any size."""


@dataclass(frozen=True, kw_only=True)
class ProxyTask:
    """A float network and what it learns of the proxy."""

    name: Literal["labels", "new-head", "follow"]
    model: nn.Module
    """A copy of the prepared network, perhaps with a new classifier."""
    batches: Rows
    """Of a `Minibatch` with all samples."""
    task: Task
    """How outputs and targets are read, and what is measured of them."""
    loss: LossFunction
    """On what the task reads."""

    @property
    def data(self) -> Minibatch:
        """All samples, with their targets."""
        data: Minibatch = self.batches.data
        return data

    def split(self, held_out: float) -> "tuple[ProxyTask, ProxyTask | None]":
        """Keep the share `held_out` of the samples apart, drawn by the seed; all in the first part, and no second, for 0."""
        if not held_out:
            return self, None
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.batches.seed))
        cut = round(len(order) * held_out)
        if not 0 < cut < len(order):
            raise BitscapeError(f"held_out = {held_out} of {len(order)} images leaves nothing on one side; give more images, or 0.5")
        return self._on(order[cut:]), self._on(order[:cut])

    def _on(self, rows: Tensor) -> "ProxyTask":
        return replace(self, batches=replace(self.batches, data=self.data.rows(rows)))

    def parts(self, count: int) -> list[Part]:
        """Return the first `count` samples in order, in parts of a batch, on the model's device."""
        first, device = self.data.rows(slice(0, count)), device_of(self.model)
        batches = [batch.to(device) for batch in Samples([first]).batches(self.batches.batch_size)]
        return [
            Part(
                inputs=batch.inputs,
                targets=self.task.read_targets(batch.targets, len(batch))[0],
                loss=self.loss.for_batch(batch.inputs),
                share=len(batch) / len(first),
                task=self.task,
            )
            for batch in batches
        ]


def proxy_task(problem: SearchProblem, learned: Learned, *, batch_size: int, head_epochs: int, folder: Path | None) -> ProxyTask:
    """State what is learned of the problem's proxy; a new classifier is warmed up first, on the float network as it is.

    "auto" learns the targets where there are some. Labels of classes are those of the float network where it predicts them at
    least twice as often as the most frequent one would be right, or errs at most half as often; otherwise a new classifier learns
    them. Without targets, and where the task is to follow, the float network's outputs are learned.

    Raises:
        BitscapeError: samples of several forms, and targets that are missing, or do not fit the network and its task.
    """
    name = _resolved(problem) if learned == "auto" else learned
    if name == "follow":
        return _following(problem, batch_size)
    if not problem.samples.labelled:
        raise BitscapeError(f"task={name!r} learns labels, and the problem has none; give labels, or task='follow'")
    samples = whole_batch(problem.samples)
    task = _in_units_of_targets(problem.meaning, samples)
    proxy = ProxyTask(
        name=name,
        model=copy.deepcopy(problem.prepared),
        batches=Rows(data=samples, reader=AS_READ, batch_size=batch_size, seed=problem.seed),
        task=task,
        loss=TaskLoss(task),
    )
    if name == "new-head":
        _warm_up(proxy, problem, head_epochs, folder)
    _check_targets(proxy)
    return proxy


def _resolved(problem: SearchProblem) -> Literal["labels", "new-head", "follow"]:
    if not problem.samples.labelled or isinstance(problem.meaning, Follow):
        return "follow"
    if not isinstance(problem.meaning, Classes):
        return "labels"
    if problem.labels is None:  # two or more values to regress look like logits
        return "follow"
    problem.meaning.read_targets(problem.labels.cpu(), len(problem.labels))  # labels count from 0
    right = int((problem.decisions(problem.samples) == problem.labels).sum())
    most_frequent = int(problem.labels.bincount().max())
    own = right >= min(2 * most_frequent, (len(problem.labels) + most_frequent) / 2)  # the second for few classes
    _log.info(
        "the float network predicts %d of %d proxy labels: %s",
        *(right, len(problem.labels)),
        "they are its own classes" if own else "they are other classes, it gets a new classifier",
    )
    return "labels" if own else "new-head"


def _following(problem: SearchProblem, batch_size: int) -> ProxyTask:
    """Follow the float network; of classes, how often the decision is the same is recorded too."""
    inputs, of_classes = inputs_alone(problem.samples).inputs, isinstance(problem.meaning, Classes)
    followed = Minibatch(inputs, problem.decisions(problem.samples) if of_classes else None)
    return ProxyTask(
        name="follow",
        model=copy.deepcopy(problem.prepared),
        batches=Rows(data=followed, reader=AS_READ, batch_size=batch_size, seed=problem.seed),
        task=CLASSES if of_classes else User(name=problem.meaning.name),
        loss=FollowFloat(problem.prepared, problem.meaning),
    )


def _in_units_of_targets(task: Task, samples: Minibatch) -> Task:
    """Return the task; one that follows, with its differences in units of the spread of the targets."""
    if not isinstance(task, Follow):
        return task
    first = samples.rows(slice(0, SAMPLE))
    targets, _ = Follow().read_targets(first.targets, len(first))
    return Follow(spreads_of(targets))


def _check_targets(proxy: ProxyTask) -> None:
    """Raise BitscapeError unless the task takes the targets, and the network has an output for each label."""
    first = proxy.data.rows(slice(0, 2)).to(device_of(proxy.model))
    try:
        _, highest_label = proxy.task.read_targets(moved(proxy.data.targets, torch.device("cpu")), len(proxy.data))
        with evaluating(proxy.model), explained_forward(first.inputs):
            proxy.task.read(call(proxy.model, first.inputs), len(first), highest_label)
    except BitscapeError as error:
        raise BitscapeError(f"{error}; or set the method's task='follow', which needs no targets") from error


def _warm_up(proxy: ProxyTask, problem: SearchProblem, epochs: int, folder: Path | None) -> None:
    if not isinstance(problem.meaning, Classes) or problem.labels is None:
        raise BitscapeError(
            f"task='new-head' learns classes, labels (n,) of whole numbers, and the outputs are of task {problem.meaning.name!r}; "
            "use task='labels' or task='follow'"
        )
    model = proxy.model
    head = _with_new_head(model, problem.network.ends[-1], int(problem.labels.max()) + 1, problem)
    model.requires_grad_(False)
    head.requires_grad_(True)
    _log.info("warming the new classifier up, epochs: %d", epochs)
    train(
        model,
        proxy.batches,
        step=_HeadStep(),
        optimizer=AdamW(lr=HEAD_RATE, weight_decay=0.0),
        epochs=epochs,
        channels_last=problem.channels_last,
        folder=None if folder is None else folder / "head",
        start=problem.prepared,
        seed=problem.seed,
    )
    model.requires_grad_(True)


def _with_new_head(model: nn.Module, name: str, classes: int, problem: SearchProblem) -> nn.Module:
    """Put a new classifier in the place of the last layer, and return it."""
    old = quantizable_layers(model)[name]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(problem.seed)  # no GPU's random state is touched
        head = new_head(name, old, classes)
    replace_module(model, old, head)
    try:
        with evaluating(model):
            CLASSES.read(call(model, problem.samples.example), 1, classes - 1)
    except (RuntimeError, BitscapeError) as error:
        raise BitscapeError(
            f"layer {name}: the network does not work with a new classifier of {classes} outputs in its place ({first_line(error)}); "
            "use task='follow'"
        ) from error
    return head


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
