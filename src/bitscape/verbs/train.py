"""bs.train: a network and the user's data in; the network trained in place, and a record of each
epoch out.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bitscape.data.epochs import Epochs, Loaded, Rows, first_of
from bitscape.engine import training
from bitscape.engine.rates import Schedule
from bitscape.engine.settings import OptimizerSettings, Sgd
from bitscape.engine.step import LossFunction, OwnLoss, Step, StepSettings
from bitscape.engine.task import Classes, Task, TaskName
from bitscape.engine.trackers import Tracker
from bitscape.engine.training import TrainResult
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError
from bitscape.signatures import checked
from bitscape.steps import Loss, Plain
from bitscape.verbs.arguments import LossOf, read_epochs, stated_task, users_function


@checked
def train(
    network: nn.Module,
    data: Any,
    *,
    epochs: int,
    step: Step | StepSettings | None = None,
    optimizer: OptimizerSettings
    | Optimizer
    | Callable[[list[nn.Parameter]], Optimizer]
    | None = None,
    schedule: Schedule | LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    loss: Callable[[Any, Any], Tensor] | LossFunction | None = None,
    metric: Any = None,
    task: TaskName | Literal["auto"] | Task = "auto",
    reference: nn.Module | None = None,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    augment: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    autocast: torch.dtype | None = None,
    channels_last: bool | None = None,
    compile: bool = False,
    accumulate: int = 1,
    ema_decay: float | None = None,
    clip_norm: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every_s: float = 60.0,
    resume: bool = True,
    seed: int = 0,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train a network in place, float or quantized, on the device where it is; it is left in
    training mode.

    On one machine the same arguments give the same bits, also when the run was killed and goes on
    from its folder. Workers of a DataLoader that outlive an epoch (persistent_workers) carry their
    random numbers on: what they draw is then the same in a run that was not killed only. The global
    random state is the caller's again afterwards. Data that fail in the middle leave a checkpoint of
    the batches before.

    Started by torchrun, every worker calls this alike, with the same data: each takes its rows of
    every batch.

    Args:
        network: any network, e.g. what `quantize(..., for_training=True)` returned.
        data: a tensor, or a tuple or mapping of tensors (n, ...), e.g. (images, labels); a torch or
            Hugging Face dataset; `Batches`; or an iterable of batches, such as a DataLoader.
            Datasets and tensors are shuffled and cut by (seed, epoch). An iterable is iterated once
            an epoch, under a random state of (seed, epoch), so that a loader shuffles alike; a
            resumed run skips the batches that are done. A generator serves one epoch only.
        epochs: passes over the data, at least 1.
        step: how a batch is learned from, e.g. `Saq()`; None = `Plain()`, one forward and one
            backward pass.
        optimizer: settings such as `Sgd(lr=0.01)` or `AdamW()`; an optimizer of torch on this
            network's parameters; or a function from the list of trainable parameters to one. None =
            `Sgd()`.
        schedule: `Cosine(...)`; a torch LRScheduler on that optimizer, or a function from the
            optimizer to one, which is stepped after every batch, not every epoch. None =
            `Cosine()`, but as they are for the rates of a torch optimizer. `Cosine` falls from
            batch to batch; where data have no length, it falls from epoch to epoch.
        loss: function (outputs, targets) -> a scalar, or a value for each sample (n,); or
            `Loss(...)` for classes. None = what the task learns.
        metric: function (outputs, targets) -> number, averaged over samples and recorded; or an
            object with update(outputs, targets) and compute(), which is asked after each epoch of
            the validation set.
        task: "classes" for logits (n, k) and labels (n,); "dense" for logits (n, k, ...) and labels
            (n, ...), 255 and -100 left out; "binary" for yes or no; "follow" for outputs that
            should become the targets, or those of `reference`; "auto" looks at the first batch: a
            `loss` is the user's own task unless outputs and targets are those of classes.
        reference: float network whose outputs are followed; targets are not used.
        inputs: from a batch to what the network is called with: a tensor, a tuple of arguments, or
            a mapping of keywords.
        targets: from a batch to what the loss compares with the outputs. For the defaults of both
            see `BatchReader`.
        augment: from the inputs of a batch, on the network's device, to those that are trained on;
            what it draws from Python, numpy and torch depends on (seed, epoch, batch).
        batch_size: samples of a batch, over all workers, of tensors and datasets; None = 128.
        validation: data of any of these forms, evaluated after each epoch.
        autocast: None = float32; or torch.bfloat16.
        channels_last: memory format of convolutions; None = channels_last where a network of one
            image tensor takes it.
        compile: run the network's forward through torch.compile.
        accumulate: parts of a batch, whose gradients add up, where memory is short.
        ema_decay: in (0, 1), average the weights too; None = not.
        clip_norm: longest gradient of all parameters together; None = any.
        folder: gets checkpoint.safetensors, run.json and metrics.jsonl; the same call goes on from
            there.
        checkpoint_every_s: seconds between checkpoints; there is also one after each epoch.
        resume: go on from the folder's checkpoint; False starts over.
        seed: of everything random.
        after_epoch: called with the number of finished epochs; what it returns joins the epoch's
            record.
        trackers: told of each epoch, e.g. `TensorBoard(folder)`.

    Raises:
        CheckpointError: the folder is of another run.
        NonFiniteError: a loss or gradient is not finite.
        BitscapeError: any other argument, batch or output that cannot be used.
    """
    batches = read_epochs(
        network, data, inputs, targets, batch_size=batch_size, shuffle=True, seed=seed
    )
    _check_epochs("data", data, batches, 1 if epochs == 1 else 2)
    users_loss = None if loss is None or hasattr(loss, "for_batch") else users_function(loss)
    meaning = stated_task(network, first_of(batches), task, loss=users_loss, reference=reference)
    if isinstance(loss, Loss) and not isinstance(meaning, Classes):
        raise BitscapeError(
            f"loss: Loss(...) is for task 'classes', and the task is {meaning.name!r}; give a "
            "function instead: "
            "(outputs, targets) -> loss"
        )
    if metric is not None:
        meaning = User(users_loss or LossOf(meaning), metric)
    held_out = None
    if validation is not None:
        held_out = read_epochs(network, validation, inputs, targets, batch_size=None, seed=seed)
        if isinstance(held_out, Rows) and batch_size is not None:
            held_out = replace(held_out, batch_size=batch_size)
        _check_epochs("validation", validation, held_out, epochs if ema_decay is None else 2)
    built, rates = _optimizer_and_schedule(network, optimizer, schedule)
    return training.train(
        network,
        batches,
        step=Plain() if step is None else step,
        optimizer=built,
        epochs=epochs,
        schedule=rates,
        task=meaning,
        loss=OwnLoss(users_loss)
        if users_loss is not None and not isinstance(meaning, User)
        else _settings(loss),
        augment=augment,
        reference=reference,
        validation=held_out,
        autocast=autocast,
        channels_last=channels_last,
        compile=compile,
        accumulate=accumulate,
        ema_decay=ema_decay,
        clip_norm=clip_norm,
        folder=folder,
        checkpoint_every_s=checkpoint_every_s,
        resume=resume,
        seed=seed,
        after_epoch=after_epoch,
        trackers=trackers,
    )


def _check_epochs(argument: str, data: Any, batches: Epochs, epochs: int) -> None:
    if epochs > 1 and isinstance(batches, Loaded) and batches.once:
        raise BitscapeError(
            f"{argument}: a {type(data).__name__} gives its batches once, and they are needed in "
            "every epoch; "
            "pass what starts anew at each iteration, such as a list or a DataLoader, or epochs=1"
        )


def _optimizer_and_schedule(
    network: nn.Module, optimizer: Any, schedule: Any
) -> tuple[OptimizerSettings | Optimizer, Schedule | LRScheduler | None]:
    chosen = _optimizer(network, optimizer)
    if (
        schedule is None
        or hasattr(schedule, "factor")
        or isinstance(schedule, LRScheduler)
        or not callable(schedule)
    ):
        return chosen, schedule
    built = chosen if isinstance(chosen, Optimizer) else chosen.build(network)
    rates = schedule(built)
    if not isinstance(rates, LRScheduler):
        raise BitscapeError(
            f"schedule: the function returns {type(rates).__name__}; it must return a torch "
            "LRScheduler on the optimizer"
        )
    return built, rates


def _optimizer(network: nn.Module, optimizer: Any) -> OptimizerSettings | Optimizer:
    if optimizer is None:
        return Sgd()
    settings_class = isinstance(optimizer, type) and not issubclass(optimizer, Optimizer)
    if settings_class or not (
        callable(optimizer) or hasattr(optimizer, "build") or isinstance(optimizer, Optimizer)
    ):
        raise BitscapeError(
            f"optimizer is {optimizer!r}; it must be settings such as Sgd(lr=0.01), an optimizer "
            "of torch on the "
            "network's parameters, or a function from parameters to one"
        )
    if isinstance(optimizer, Optimizer) or hasattr(optimizer, "build"):
        ready: OptimizerSettings | Optimizer = optimizer
        return ready
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trainable:
        raise BitscapeError(
            "network has no trainable parameter; call network.requires_grad_(True) before training"
        )
    built = optimizer(trainable)
    if not isinstance(built, Optimizer):
        raise BitscapeError(
            f"optimizer: the function returns {type(built).__name__}; it must return an optimizer "
            "of torch"
        )
    return built


def _settings(loss: Any) -> LossFunction | None:
    return loss if hasattr(loss, "for_batch") else None

