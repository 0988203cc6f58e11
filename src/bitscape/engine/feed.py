"""Batches on the device, made ahead of time where a GPU would wait for them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from bitscape.engine.workers import part, rank, world_size
from bitscape.errors import BitscapeError

if TYPE_CHECKING:
    from bitscape.data.batches import Batches

Item = TypeVar("Item")
_AHEAD = 4
"""Batches in flight: enough to hide one slow batch; each costs its own size in pinned memory."""


def feed(batches: "Batches", epoch: int, *, start: int, device: torch.device, channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's part of each labelled batch of `epoch`, from number `start` on, on `device`."""
    made = _labelled(batches, epoch, start)
    if device.type == "cuda":
        made = prefetch(((_pinned(images), _pinned(labels)) for images, labels in made), _AHEAD)
    for images, labels in made:
        moved = images.to(device, non_blocking=True)
        if channels_last and moved.ndim == 4:
            moved = moved.contiguous(memory_format=torch.channels_last)
        yield moved, labels.to(device, non_blocking=True)


def prefetch(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """Yield `items` in order, the next `ahead` of them being made in a thread meanwhile; its errors come through."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield cast(Item, item)


def own_part(batches: "Batches", epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield this worker's rows of each batch of `epoch`: bit for bit what they are in the whole batch."""
    if world_size() == 1:
        return batches.epoch(epoch, start=start)
    from bitscape.data.batches import Batches

    rows = slice(rank(), None, world_size())
    if isinstance(batches, Batches):
        return batches.epoch(epoch, start=start, rows=rows)
    whole = batches.epoch(epoch, start=start)
    return ((images[rows], None if labels is None else labels[rows]) for images, labels in whole)


def images_of_all(batches: "Batches", batch: int, own: int) -> int:
    """Return how many images batch number `batch` has over all workers; `own` are this worker's."""
    if world_size() == 1:
        return own
    from bitscape.data.batches import Batches

    if isinstance(batches, Batches):
        return len(batches.cuts[batch])
    return min(batches.batch_size, len(batches.dataset.images) - batch * batches.batch_size)


def for_all_workers(batches: "Batches") -> "Batches":
    """Return `batches` cut such that the last one has two images for every worker, as norms need."""
    from bitscape.data.batches import Batches

    return replace(batches, fewest=2 * world_size()) if isinstance(batches, Batches) and world_size() > 1 else batches


def check_shared(batches: "Batches") -> None:
    """Raise BitscapeError unless every batch, so also the last, has an image for every worker."""
    part(images_of_all(batches, len(batches) - 1, own=1))


def _pinned(values: Tensor) -> Tensor:
    return values if values.is_cuda else values.pin_memory()


def _labelled(batches: "Batches", epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in own_part(batches, epoch, start=start):
        if labels is None:
            raise BitscapeError("the dataset has no labels (labels=None); training needs them: load one with labels")
        yield images, labels
