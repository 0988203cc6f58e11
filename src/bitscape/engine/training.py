"""The entry: arguments checked, settings resolved, the loop run under its own random state."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bitscape.data.epochs import Epochs, batches_in, first_of
from bitscape.engine import workers
from bitscape.engine.describe import bits_of, describe
from bitscape.engine.ema import Ema
from bitscape.engine.evaluate import known_labels
from bitscape.engine.feed import Feed, check_shared, for_all_workers
from bitscape.engine.forward import check_autocast, device_of, lay_out, loop_forward
from bitscape.engine.loop import Loop
from bitscape.engine.rates import Rates, Schedule, check_schedule, describe_schedule
from bitscape.engine.settings import Cosine, OptimizerSettings, check_optimizer, describe_optimizer
from bitscape.engine.state import RunState
from bitscape.engine.step import LossFunction, Step, StepSettings, TaskLoss
from bitscape.engine.task import CLASSES, Task
from bitscape.engine.trackers import Tracker, Watched
from bitscape.errors import BitscapeError
from bitscape.folders import locked
from bitscape.models.dtypes import check_float32
from bitscape.nested import tensors_in


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves besides the trained model."""

    records: tuple[Mapping[str, Any], ...]
    """One record an epoch, as in metrics.jsonl: epoch (from 1), loss, top1 or the task's other metric, gradient_norm, lr, images,
    train_s (wall clock of all steps so far), the step's extras, and validation_* and ema_validation_* with a validation set."""
    ema: Mapping[str, Tensor] | None
    """Averaged state dict, if `ema_decay` was given."""


@torch.enable_grad()
def train(
    model: nn.Module,
    batches: Epochs,
    *,
    step: Step | StepSettings,
    optimizer: OptimizerSettings | torch.optim.Optimizer,
    epochs: int,
    schedule: Schedule | LRScheduler | None = None,
    task: Task = CLASSES,
    loss: LossFunction | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool | None = None,
    compile: bool = False,
    accumulate: int = 1,
    ema_decay: float | None = None,
    clip_norm: float | None = None,
    augment: Callable[[Any], Any] | None = None,
    reference: nn.Module | None = None,
    validation: Epochs | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every_s: float = 60.0,
    resume: bool = True,
    start: nn.Module | None = None,
    seed: int = 0,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train `model` in place, on the device where it is; it is left in training mode.

    optimizer: settings, or an optimizer of torch on the model's parameters, whose state goes into checkpoints.
    schedule: what rates are multiplied by, or a schedule of torch on that optimizer, stepped after each update; None =
    `Cosine()`, or as they are in an optimizer of torch. Where the batches of an epoch are not known beforehand, an epoch
    counts as one step of ours. task: what outputs mean. loss: None = the task's. augment: what is done to the inputs of
    each batch, on the device, under a random state of (seed, epoch, batch). reference: a network whose outputs take the
    place of the targets. autocast: None or torch.bfloat16. channels_last: memory format of the convolutions, None =
    channels_last, which is faster, where two images of the first batch show that the network takes it. compile: the
    model's forward through torch.compile, where a C++ compiler is found. accumulate: cut each batch into so many
    parts, whose gradients add up: memory for one part at a time, and norms see one part at a time; no part is empty,
    nor has a part a single image where batch norms would find no variance in it. ema_decay: in (0, 1), average the
    state as well. clip_norm: scale the gradient of all parameters together down to this length. validation: evaluated
    after each epoch. folder: gets
    checkpoint.safetensors (every `checkpoint_every_s` seconds and after each epoch), run.json and metrics.jsonl.
    resume: go on from the folder's checkpoint if there is one; False starts over and replaces it. start: the network
    that the user gave; a checkpoint of a run that began with another one is refused. None: of other weights the log says so.
    seed: of dropout and the like; the batches carry their own. after_epoch: called after each epoch, on every worker, with
    the number of finished epochs, before that epoch's checkpoint; the finite numbers it returns join the epoch's record, under
    names that the loop does not use. A checkpoint does not compare it: a resumed run may have another one, or none. trackers: told of
    each epoch on the first worker; one that fails is logged and left out, the run goes on. They are not compared either.

    On one machine the same arguments give the same bits, also when the run was killed and resumed. The global random
    state is the caller's again afterwards.

    Started by torchrun (on GPUs with the model on cuda:LOCAL_RANK), every worker calls this alike. They share every batch, which
    needs an image for each (`batch_size` is that of all together; a last batch of fewer than two for each joins the one before),
    start from the first one's weights and average their gradients; see `engine.workers`. Norms see their own worker's part, and
    after every batch running statistics are averaged. Records are of all workers; only the first one writes the folder,
    which all must see. Another number of workers may resume a run, to other bits.

    A failing validation leaves a checkpoint of the epoch before it. SIGINT and SIGTERM wait for the end of the batch and leave a checkpoint
    too; then they take the effect that they had before. `folder` is locked meanwhile: another process that trains there is refused.

    Raises BitscapeError for bad arguments, labels or outputs; CheckpointError for a checkpoint of another model, other
    settings or another format, or a damaged one; NonFiniteError at the first loss or gradient that is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise BitscapeError("torch.inference_mode is on, and training needs gradients; train outside of it")
    _check_step(step)
    _check(epochs, accumulate, ema_decay, clip_norm, checkpoint_every_s, autocast)
    check_float32(model)
    if batches_in(batches) == 0:
        raise BitscapeError("batches has no batch; use more images, a smaller batch_size or drop_last=False")
    loss = loss or TaskLoss(task)
    first = first_of(batches)
    laid_out = lay_out(model, first.inputs, channels_last, training=True)
    built = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.build(model)
    check_optimizer(built, model)
    if schedule is None and built is not optimizer:
        schedule = Cosine()
    elif schedule is not None:
        batches_an_epoch = batches_in(batches)
        check_schedule(schedule, built, None if batches_an_epoch is None else epochs * batches_an_epoch)
    settings: dict[str, Any] = {
        **({} if start is None else {"start": describe(start)["sample_sha256"]}),
        "epochs": epochs,
        "seed": seed,
        "bits": bits_of(model),
        "step": describe(step),
        "optimizer": describe_optimizer(optimizer),
        "schedule": describe_schedule(schedule),
        "task": task.name,
        "metric": describe(task.metric),
        "loss": describe(loss),
        "augment": describe(augment),
        "reference": describe(reference),
        "autocast": describe(autocast),
        "channels_last": laid_out,
        "compile": compile,
        "accumulate": accumulate,
        "ema_decay": ema_decay,
        "clip_norm": clip_norm,
        "batches": describe(batches),
        "batches_an_epoch": batches_in(batches),
        "first_batch": [f"{tuple(tensor.shape)}, {tensor.dtype}" for tensor in tensors_in(first)],
        "validation": describe(validation),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }
    device = device_of(model)
    workers.join(device)
    batches = for_all_workers(batches)
    check_shared(batches)
    workers.same_start(model)
    state = RunState(
        model=model,
        optimizer=built,
        rates=Rates(optimizer=built, schedule=schedule),
        task=task,
        step=step if callable(step) else step.build(),
        ema=None if ema_decay is None else Ema.of(model, ema_decay),
        settings=settings,
        device=device,
        start=describe(model)["sample_sha256"],
    )
    loop = Loop(
        state=state,
        feed=Feed(
            batches=batches,
            device=device,
            task=task,
            channels_last=laid_out,
            augment=augment,
            seed=seed,
            reference=reference,
        ),
        validation=validation,
        epochs=epochs,
        loss=loss,
        autocast=autocast,
        highest_label=known_labels(task, batches, validation),
        accumulate=accumulate,
        clip_norm=clip_norm,
        folder=None if folder is None else Path(folder),
        checkpoint_every_s=checkpoint_every_s,
        after_epoch=after_epoch,
        trackers=Watched(trackers if workers.is_first() else ()),
    )
    with ExitStack() as block:
        block.enter_context(_seeded(seed, device))
        block.callback(state.rates.put_back)

        def read(output: Any, samples: int) -> Any:
            return task.read(output, samples, loop.highest_label)

        block.enter_context(loop_forward(model, autocast=autocast, compiled=compile, read=read))
        if folder is not None and workers.is_first():
            block.enter_context(locked(Path(folder)))
        loop.open(resume)
        loop.run()
    return TrainResult(records=tuple(state.records), ema=None if state.ema is None else state.ema.values)



@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Own random state, and convolutions that repeat bit for bit, inside the block."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _check_step(step: object) -> None:
    if isinstance(step, type):
        raise BitscapeError(f"step is the class {step.__name__}; give an instance, e.g. step={step.__name__}()")
    if not callable(step) and not callable(getattr(step, "build", None)):
        raise BitscapeError(f"step is {step!r}; it must be a training step or the settings of one, e.g. step=Saq()")


def _check(
    epochs: int,
    accumulate: int,
    ema_decay: float | None,
    clip_norm: float | None,
    checkpoint_every_s: float,
    autocast: torch.dtype | None,
) -> None:
    if epochs < 1:
        raise BitscapeError(f"epochs is {epochs}; it must be at least 1")
    if accumulate < 1:
        raise BitscapeError(f"accumulate is {accumulate}; it must be at least 1, the number of parts of a batch")
    if ema_decay is not None and not 0.0 < ema_decay < 1.0:
        raise BitscapeError(f"ema_decay is {ema_decay}; it must be in (0, 1), usually 0.999, or None for no average")
    if clip_norm is not None and not 0.0 < clip_norm < math.inf:
        raise BitscapeError(f"clip_norm is {clip_norm}; it must be > 0, or None for no clipping")
    if checkpoint_every_s < 0.0:
        raise BitscapeError(f"checkpoint_every_s is {checkpoint_every_s}; it must be >= 0 (0 = after every batch)")
    check_autocast(autocast)
