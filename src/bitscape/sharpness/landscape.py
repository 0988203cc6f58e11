"""A slice through the loss landscape: the loss on a plane of two random directions through the network's weights.

Li et al.: "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv 1712.09913 (Sec. 4: Gaussian directions, each of whose
filters is as long as the weight's). The plane goes through Q(w), not w: a quantizer would round small moves of w away.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.progress import track
from bitscape.sharpness.ball import Ball
from bitscape.sharpness.passes import faithful
from bitscape.sharpness.probe import DEFAULT_BALL, BatchLoss, FullBatch, finite


@dataclass(frozen=True, kw_only=True)
class LossSlice:
    """The loss at u + a d1 + b d2; plain numbers, so that `dataclasses.asdict` of it is JSON."""

    offsets: tuple[float, ...]
    """(points,): the values of a, and of b; symmetric, 0 in the middle. At 1 every filter of a direction is as long as the weight's."""
    losses: tuple[tuple[float, ...], ...]
    """(points, points): losses[i][j] is that at a = offsets[i], b = offsets[j]; inf or nan where the network overflows."""

    @property
    def center(self) -> float:
        """The loss of the network itself."""
        middle = len(self.offsets) // 2
        return self.losses[middle][middle]


def loss_slice(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    ball: Ball = DEFAULT_BALL,
    loss: BatchLoss = functional.cross_entropy,
    batch_size: int = 64,
) -> LossSlice:
    """Return the loss over all images on a square grid of points^2 networks around this one.

    Weights of convolutions and linear layers move, each filter (index 0 of the weight) by random amounts in proportion to its length;
    biases and norms stay, whatever the ball says. Networks of one architecture get the same Gaussians from one seed. Costs one forward
    pass over the images for each point, and one backward pass.

    Args:
        model, images, labels: as for `probe_sharpness`; the network is left as it was, bit for bit.
        span: largest |a| and |b|.
        points: to a side; odd, so that the network itself is among them.
        seed: of the directions.
        ball: its `weights` say what moves, Q(w) or the latent w; clips and adaptive must be False.
        loss: as for `probe_sharpness`, with a gradient.

    Raises:
        BitscapeError: a setting out of range, labels that do not match, no weight, or a gradient that is not finite.
    """
    _check(span, points, ball)
    batch = FullBatch(model, images, labels, loss, batch_size)
    weights = replace(ball, norms=False, biases=False)
    members = weights.members(model)
    with batch.evaluated():
        # The gradient tells which weights the loss depends on: a head used in training alone has no Q(w) to see.
        with weights.watched(model) as ascent:
            batch.differentiate()
        finite(ascent.norm, "gradient")
        one, two = _directions(ascent.values(), seed)

        def at(a: float, b: float) -> float:
            with ExitStack() as stack:
                for name in one:
                    stack.enter_context(members[name].moved(a * one[name] + b * two[name]))
                return batch.value()

        offsets = _offsets(span, points)
        with faithful(quantizable_layers(model).values()):
            losses = [at(a, b) for a, b in track(list(product(offsets, offsets)), label="loss slice: point")]
    return LossSlice(offsets=offsets, losses=tuple(tuple(losses[i : i + points]) for i in range(0, points**2, points)))


def _check(span: float, points: int, ball: Ball) -> None:
    if not (span > 0 and math.isfinite(span)) or points < 3 or points % 2 == 0:
        raise BitscapeError(f"span = {span}, points = {points}: a finite span above 0, 1 is usual; an odd number of points, 3 or more")
    if ball.weights == "independent" or ball.clips or ball.adaptive:
        raise BitscapeError(f'ball = {ball}: for a slice, one with weights "quantized" or "latent", and without clips and adaptive')


def _offsets(span: float, points: int) -> tuple[float, ...]:
    half = points // 2
    return tuple(span * (i / half) for i in range(-half, half + 1))  # the middle is 0 exactly


def _directions(weights: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    one, two = ({name: _direction(weight, generator) for name, weight in weights.items()} for _ in range(2))
    return one, two


def _direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    """d <- d ||w|| / ||d||, filter by filter (Sec. 4)."""
    gaussian = torch.randn(weight.shape, generator=generator).to(weight)
    return gaussian * (_lengths(weight) / _lengths(gaussian))


def _lengths(weight: Tensor) -> Tensor:
    each: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return each
