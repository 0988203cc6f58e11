"""Probe sharpness: how much the loss over given images rises one step up its gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.calling import Inputs, call, sample_count
from bitscape.data.samples import Minibatch
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32, check_inputs
from bitscape.models.modes import evaluating
from bitscape.nested import tensors_in
from bitscape.sharpness.ball import Ball

BatchLoss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> scalar loss, averaged over the batch; for classes logits (n, classes) and labels (n,)."""
DEFAULT_BALL = Ball()


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """The loss at the network's point u, and at u + radius * g / ||g||."""

    loss: float
    """L(u), mean over the images."""
    gap: float
    """L(u + radius * g / ||g||) - L(u)."""
    curvature: float
    """2 * gap / radius^2; near a minimum, where g is small, about the largest Hessian eigenvalue."""
    gradient_norm: float
    """||g|| over all members of the ball, or ||T g|| of ASAM."""


def probe_sharpness(
    model: nn.Module,
    images: Inputs,
    labels: Any,
    *,
    radius: float = 0.05,
    ball: Ball = DEFAULT_BALL,
    loss: BatchLoss = functional.cross_entropy,
    batch_size: int = 64,
) -> Sharpness:
    """Return the rise of the loss one step of length `radius` up the gradient of all images.

    Args:
        model: float or quantized network, quantizers as they are.
        images: what the network is called with, e.g. normalized images (n, c, h, w); moved to the model's device batch by batch.
        labels: (n,), or what else the loss compares outputs with.
        radius: L2 length of the step over all members of the ball; compare networks at one radius only.

    Raises:
        BitscapeError: a radius not above 0, labels that do not match, or a gradient that is not finite.
    """
    if not radius > 0:
        raise BitscapeError(f"radius = {radius}: a length above 0; 0.05 is usual")
    batch = FullBatch(model, images, labels, loss, batch_size)
    with batch.evaluated():
        with ball.watched(model) as ascent:
            value = batch.differentiate()
        norm = finite(ascent.norm, "gradient")
        with ascent.applied(ascent.factor(radius)):
            gap = batch.value() - value
    return Sharpness(loss=value, gap=gap, curvature=2 * gap / radius**2, gradient_norm=norm)


def finite(norm: Tensor, what: str) -> float:
    """`norm` as a number; BitscapeError if it is not finite."""
    if not norm.isfinite():
        raise BitscapeError(f"model: the norm of its {what} is {norm:g} on these images; check the weights and the images' normalization")
    return float(norm)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class FullBatch:
    """The mean loss over all images, a mini-batch at a time.

    Raises:
        BitscapeError: no image, labels that do not match, a batch_size below 1, or a model or images that are not float32.
    """

    model: nn.Module
    images: Inputs
    labels: Any
    loss: BatchLoss
    batch_size: int

    def __post_init__(self) -> None:
        check_float32(self.model)
        check_inputs(self.images, model=self.model)
        labels = sample_count(self.labels)
        if self.count != labels or self.batch_size < 1:
            raise BitscapeError(
                f"{self.count} images, {labels} labels, batch_size = {self.batch_size}: give one label an image, "
                "and a batch_size of at least 1"
            )

    @property
    def count(self) -> int:
        """Images."""
        return sample_count(self.images)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within the block the network is in eval mode."""
        # With gradients also where none are taken: modules may have a faster forward without, whose rounding differs.
        with evaluating(self.model), torch.enable_grad():
            yield

    def value(self) -> float:
        """The loss."""
        return sum(float(part.detach()) for part in self.parts())

    def differentiate(self) -> float:
        """The loss; hooks see the gradient, and no `.grad` changes."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        total = 0.0
        for part in self.parts():
            if part.requires_grad:
                torch.autograd.grad(part, parameters, allow_unused=True)
            total += float(part.detach())
        return total

    def parts(self) -> Iterator[Tensor]:
        """Each mini-batch's share of the mean loss."""
        whole = Minibatch(self.images, self.labels)
        device = next((p.device for p in self.model.parameters()), next(tensors_in(self.images)).device)
        for start in range(0, self.count, self.batch_size):
            part = whole.rows(slice(start, start + self.batch_size)).to(device)
            with explained_forward(part.inputs):
                outputs = call(self.model, part.inputs)
            outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
            yield self.loss(outputs, part.targets) * (len(part) / self.count)
