"""Batches on the device, made ahead of time where a GPU would wait for them."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, map_tensors, sample_count
from bitscape.data.batches import Batches
from bitscape.data.epochs import Epochs, Loaded, Rows
from bitscape.data.samples import Minibatch
from bitscape.data.streams import RandomStream, seed_of
from bitscape.engine.task import CLASSES, Task
from bitscape.engine.workers import part, rank, world_size
from bitscape.errors import BitscapeError
from bitscape.models.modes import evaluating

Item = TypeVar("Item")
_AHEAD = 4
"""Batches in flight: enough to hide one slow batch; each costs its own size in pinned memory."""


@dataclass(frozen=True)
class Fed:
    """This worker's part of a batch, on the device."""

    part: Minibatch
    whole: int
    """Samples of the batch, over all workers."""
    highest_label: int
    """Of this part; -1 for none."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a run reads of its data."""

    batches: Epochs
    device: torch.device
    task: Task = CLASSES
    channels_last: bool = False
    """Memory format of the images."""
    augment: Callable[[Inputs], Inputs] | None = None
    """What is done to the inputs of each batch, on the device."""
    seed: int = 0
    """Of the augmentation."""
    reference: nn.Module | None = None
    """Network whose outputs take the place of the targets."""

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Fed]:
        """Yield this worker's part of each batch of epoch `number`, from batch `start` on.

        Raises BitscapeError for a batch without a sample for each worker, and targets that the task
        does not take.
        """
        read: Iterator[Fed] = (
            self._read(*item) for item in own_part(self.batches, number, start=start)
        )
        # A loader or dataset of the user's draws global random numbers, which a thread would mix
        # with those of the training.
        if self.device.type == "cuda" and not isinstance(self.batches, Loaded | Rows):
            read = prefetch((self._pinned(fed) for fed in read), _AHEAD)
        for batch, fed in enumerate(read, start):
            yield replace(fed, part=self._prepared(fed.part.to(self.device), number, batch))

    def _read(self, own: Minibatch, whole: int) -> Fed:
        part(whole)
        if self.reference is not None:
            return Fed(Minibatch(own.inputs), whole, -1)
        targets, highest = self.task.read_targets(own.targets, len(own))
        return Fed(Minibatch(own.inputs, targets), whole, highest)

    def _pinned(self, fed: Fed) -> Fed:
        return replace(
            fed,
            part=Minibatch(
                map_tensors(_pinned, fed.part.inputs), map_tensors(_pinned, fed.part.targets)
            ),
        )

    def _prepared(self, own: Minibatch, epoch: int, batch: int) -> Minibatch:
        inputs = own.inputs if self.augment is None else self._augmented(own.inputs, epoch, batch)
        if self.channels_last:
            inputs = map_tensors(_laid_out, inputs)
        if self.reference is None:
            return Minibatch(inputs, own.targets)
        return Minibatch(inputs, followed(self.reference, inputs, self.task))

    def _augmented(self, inputs: Inputs, epoch: int, batch: int) -> Inputs:
        assert self.augment is not None
        position = (self.seed, epoch, batch, rank())
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu), RandomStream(*position).drawing():
            if on_gpu:
                torch.cuda.manual_seed(seed_of(*position))
            return self.augment(inputs)


def followed(reference: nn.Module, inputs: Inputs, task: Task) -> object:
    """Return the outputs of the network that is followed, as targets."""
    with evaluating(reference):
        return task.read_targets(call(reference, inputs), sample_count(inputs))[0]


def prefetch(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """Yield `items` in order, the next `ahead` of them being made in a thread meanwhile; its errors
    come through.
    """
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield cast(Item, item)


def own_part(batches: Epochs, epoch: int, *, start: int = 0) -> Iterator[tuple[Minibatch, int]]:
    """Yield this worker's rows of each batch of `epoch`, bit for bit what they are in the whole
    batch, and how many that has.
    """
    rows = slice(rank(), None, world_size())
    if world_size() > 1 and isinstance(batches, Batches):
        made = batches.epoch(epoch, start=start, rows=rows)
        for (images, labels), cut in zip(made, batches.cuts[start:], strict=True):
            yield Minibatch(images, labels), len(cut)
        return
    for inputs, targets in batches.epoch(epoch, start=start):
        whole = Minibatch(inputs, targets)
        yield (whole if world_size() == 1 else whole.rows(rows)), len(whole)


def for_all_workers(batches: Epochs) -> Epochs:
    """Return `batches` cut such that the last one has two samples for every worker, as norms need."""
    return (
        replace(batches, fewest=2 * world_size())
        if isinstance(batches, Batches | Rows) and world_size() > 1
        else batches
    )


def check_shared(batches: Epochs) -> None:
    """Raise BitscapeError unless every batch, so also the last, has a sample for every worker,
    where that is known beforehand.
    """
    if isinstance(batches, Batches | Rows):
        part(len(batches.cuts[-1]))
    sampler = getattr(batches.data, "sampler", None) if isinstance(batches, Loaded) else None
    if world_size() > 1 and getattr(sampler, "num_replicas", 1) > 1:
        raise BitscapeError(
            f"data: its {type(sampler).__name__} gives each worker rows of its own, and workers "
            "share every batch here; "
            "pass the loader without that sampler"
        )


def _pinned(values: Tensor) -> Tensor:
    return values if values.is_cuda else values.pin_memory()


def _laid_out(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values
