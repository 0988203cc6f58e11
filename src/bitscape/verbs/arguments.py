"""What `train` and `evaluate` make of their arguments: data, and what the outputs mean."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count
from bitscape.data.epochs import Epochs, Loaded, Rows, epochs_of
from bitscape.data.reading import BatchReader
from bitscape.data.samples import Minibatch
from bitscape.engine.dense import Dense
from bitscape.engine.forward import device_of
from bitscape.engine.outputs import rows_by_name, spreads_of
from bitscape.engine.task import Classes, Follow, Task, TaskName, task_of
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_module
from bitscape.models.modes import evaluating

_log = logging.getLogger("bitscape.verbs")

Named = TaskName | Literal["auto"]
FromBatch = Callable[[Any], Any] | None
UsersLoss = Callable[[Any, Any], Tensor]


def read_epochs(
    network: nn.Module,
    data: Any,
    inputs: FromBatch,
    targets: FromBatch,
    *,
    batch_size: int | None,
    seed: int,
    shuffle: bool = False,
) -> Epochs:
    """Return the user's data in batches. Raises BitscapeError for data that cannot be read."""
    check_module(network, "network")
    reader = BatchReader.of(network, inputs, targets)
    batches = epochs_of(data, reader, batch_size=batch_size, shuffle=shuffle, seed=seed)
    if (inputs or targets) and not isinstance(batches, Rows | Loaded):
        raise BitscapeError(
            f"inputs, targets: a {type(data).__name__} gives both by itself; leave these "
            "functions out"
        )
    return batches


def stated_task(
    network: nn.Module,
    first: Minibatch,
    task: Named | Task,
    *,
    loss: UsersLoss | None = None,
    reference: nn.Module | None = None,
) -> Task:
    """Return the task that is asked for, or that the first batch suggests.

    A loss of the user's is a task of its own unless "auto" sees outputs and targets of classes, or
    another task is asked for. With a reference network "auto" follows it. What is followed gives
    the units of differences.

    Raises:
        BitscapeError: an unknown task, outputs that do not fit it, or nothing to follow.
    """
    first = first.to(device_of(network))
    stated = _named(network, first, task, loss, reference) if isinstance(task, str) else task
    if reference is not None and not isinstance(stated, Follow | User):
        raise BitscapeError(
            f"reference: task {stated.name!r} looks at targets; use task='follow', or leave "
            "reference out"
        )
    if isinstance(stated, Follow) and not stated.spreads:
        stated = Follow(_spreads(first, reference))
    if task == "auto":
        _log.info("the outputs are taken as task %s; task=... says otherwise", stated.name)
    return stated


def users_function(loss: Any) -> UsersLoss:
    """Return a loss of the user's. Raises BitscapeError unless it is a function."""
    if isinstance(loss, type) or not callable(loss):
        raise BitscapeError(
            f"loss is {loss!r}; it must be a function (outputs, targets) -> loss, or Loss(...)"
        )
    function: UsersLoss = loss
    return function


def _named(
    network: nn.Module,
    first: Minibatch,
    task: Named,
    loss: UsersLoss | None,
    reference: nn.Module | None,
) -> Task:
    if task == "follow" or (task == "auto" and reference is not None):
        return Follow() if loss is None else User(loss)
    on_gpu = [device] if (device := device_of(network)).type == "cuda" else []
    with torch.random.fork_rng(on_gpu), explained_forward(first.inputs):
        suggested = task_of(network, first.inputs, task, first.targets)
    of_classes = isinstance(suggested, Classes | Dense) and isinstance(first.targets, Tensor)
    if loss is not None and task == "auto" and not of_classes:
        return User(loss)
    return Follow() if isinstance(suggested, Follow) else suggested


def _spreads(first: Minibatch, reference: nn.Module | None) -> dict[str, float]:
    if reference is None:
        return spreads_of(Follow().read_targets(first.targets, len(first))[0])
    with evaluating(reference):
        return spreads_of(rows_by_name(call(reference, first.inputs), sample_count(first.inputs)))


@dataclass(frozen=True)
class LossOf:
    """The loss of a task, on outputs and targets as they come: beside a metric of the user's, who
    expects them so.
    """

    task: Task

    def __call__(self, outputs: Inputs, targets: Any) -> Tensor:
        """Return the task's loss, a scalar."""
        samples = sample_count(outputs)
        read, highest = self.task.read_targets(targets, samples)
        return self.task.loss(self.task.read(outputs, samples, highest), read)
