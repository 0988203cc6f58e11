"""Accuracy of any network on labelled batches."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.engine.feed import own_part
from bitscape.engine.forward import as_logits, autocast_on, check_autocast, device_of, lay_out
from bitscape.engine.nonfinite import NonFiniteError, diagnose
from bitscape.engine.workers import total
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32
from bitscape.models.modes import evaluating
from bitscape.progress import track

if TYPE_CHECKING:
    from bitscape.data.batches import Batches


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often, and how surely, a network is right."""

    top1: float
    """Percent of images whose largest logit is the label's."""
    top5: float
    """Percent of images whose label is among the five largest logits (all of them, below five classes)."""
    loss: float
    """Mean cross entropy, in nats."""
    images: int
    """Images counted."""


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
    together: of several workers (`engine.workers`), all of which must call this, each takes its part of every batch.
    Every module's training flag has its former value afterwards. Raises BitscapeError when there are no labels or no
    images, when a label is not below the number of the model's outputs, when the output is not (n, classes), when the network
    does not take channels_last=True, or when it fails on the images; NonFiniteError when outputs are NaN or infinite.
    """
    check_autocast(autocast)
    check_float32(model)
    highest = highest_label(batches)
    if device is not None:
        model.to(device)
    if channels_last is not None:
        lay_out(model, batches, channels_last, training=False)
    where = device_of(model)
    sums = torch.zeros(5, dtype=torch.float64, device=where)
    made = own_part(batches, 0) if together else batches.epoch(0)
    with evaluating(model):
        for images, labels in track(made, total=len(batches), label="evaluate, batch"):
            if len(images):  # a last batch may have none for this worker
                logits = _logits(model, images.to(where, non_blocking=True), autocast, highest)
                sums += _batch_sums(logits, _given(labels).to(where, non_blocking=True))
    *sums_of_all, seen = (total(sums) if together else sums).tolist()
    images_seen = round(seen)
    if images_seen == 0:
        raise BitscapeError("batches hold no image to evaluate on; check the dataset, batch_size and drop_last")
    top1, top5, loss, bad = (value / images_seen for value in sums_of_all)
    if bad or not math.isfinite(loss):
        raise NonFiniteError(
            f"model: {round(bad * images_seen)} of {images_seen} images of {batches.dataset.name!r} give outputs that are not finite, "
            f"the mean loss is {loss}; {_reason(model, batches, where, autocast, highest)}; check the weights and the normalization"
        )
    return Accuracy(top1=100 * top1, top5=100 * top5, loss=loss, images=images_seen)


def highest_label(batches: "Batches") -> int:
    """Return the largest label of the dataset; BitscapeError when it has no labels, no images or a label below 0."""
    labels = _given(batches.dataset.labels)
    if len(labels) == 0:
        raise BitscapeError(f"dataset {batches.dataset.name!r} is empty; load at least one image")
    if int(labels.min()) < 0:
        raise BitscapeError(f"dataset {batches.dataset.name!r} has the label {int(labels.min())}; labels count from 0: drop its images")
    return int(labels.max())


def _given(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise BitscapeError("the dataset has no labels (labels=None); accuracy and loss need them")
    return labels


def _logits(model: nn.Module, images: Tensor, autocast: torch.dtype | None, highest: int) -> Tensor:
    with autocast_on(images.device, autocast), explained_forward(images):
        output = model(images)
    return as_logits(output, len(images), highest)


def _reason(model: nn.Module, batches: "Batches", where: torch.device, autocast: torch.dtype | None, highest: int) -> str:
    """Diagnose the first batch whose logits are not finite; where there is none, the last one."""
    with evaluating(model):
        for images, _ in batches.epoch(0):
            on_device = images.to(where)
            if not bool(_logits(model, on_device, autocast, highest).isfinite().all()):
                break
        with autocast_on(where, autocast):
            return diagnose(model, on_device)


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    bad = ~logits.isfinite().all(dim=1)
    count = torch.full_like(loss, len(labels))
    return torch.stack([value.double() for value in (hits[:, 0].sum(), hits.sum(), loss, bad.sum(), count)])
