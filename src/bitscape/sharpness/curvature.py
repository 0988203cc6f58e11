"""The largest Hessian eigenvalue of the loss over given images."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.progress import track
from bitscape.sharpness.ball import Ball
from bitscape.sharpness.passes import faithful
from bitscape.sharpness.probe import DEFAULT_BALL, BatchLoss, FullBatch, finite


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """The Hessian's eigenvalue of largest magnitude."""

    value: float
    """Rayleigh quotient <v, H v> of the last unit vector v."""
    residual: float
    """||H v - value * v|| / |value|: how far v is from an eigenvector."""
    iterations: int
    """Hessian-vector products taken."""


def top_eigenvalue(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    ball: Ball = DEFAULT_BALL,
    loss: BatchLoss = functional.cross_entropy,
    batch_size: int = 64,
) -> Eigenvalue:
    """Return the Hessian's eigenvalue of largest magnitude in the members of the ball, by power iteration.

    Quantized activations enter straight through: rounding errors stay as they are, slopes are those of the quantizers' backward pass.
    (Differences of gradients would see codes jump: with 8-bit activations no width of the difference gave an eigenvector.) An iteration
    costs about three forward and backward passes over the images, and the second-order graph of a mini-batch.

    Args:
        model, images, labels, loss: as for `probe_sharpness`.
        iterations: at most so many.
        tolerance: ends the iteration once the value changes by no more than this share of itself.
        seed: of the first vector.
        ball: its `clips` and `adaptive` must be False.

    Raises:
        BitscapeError: a setting out of range, labels that do not match, no member, or a curvature that is not finite.
    """
    if iterations < 1 or ball.clips or ball.adaptive:
        raise BitscapeError(f"iterations = {iterations}, ball = {ball}: at least 1 iteration, and a ball without clips and adaptive")
    batch = FullBatch(model, images, labels, loss, batch_size)
    members = ball.members(model).values()
    if not members:
        raise BitscapeError(f"model: no parameter of it is a member of {ball} and requires a gradient")
    with batch.evaluated(), _twice_differentiable(model), ExitStack() as stack:
        product = _HessianProduct(batch, [stack.enter_context(member.freed()) for member in members])
        return _power_iteration(product, product.first_vector(seed), iterations, tolerance)


def _power_iteration(product: Callable[[Tensor], Tensor], v: Tensor, iterations: int, tolerance: float) -> Eigenvalue:
    before = math.inf
    for done in track(range(1, iterations + 1), label="eigenvalue: iteration"):
        hv = product(v)
        value, length = float(torch.dot(v, hv)), finite(hv.norm(), "curvature")
        if done == iterations or length == 0 or abs(value - before) <= tolerance * abs(value):
            break
        before, v = value, hv / length
    residual = float((hv - value * v).norm()) / abs(value) if length else 0.0
    return Eigenvalue(value=value, residual=residual, iterations=done)


@dataclass(frozen=True)
class _HessianProduct:
    """v -> H v, both flat over all variables."""

    batch: FullBatch
    variables: list[Tensor]

    def first_vector(self, seed: int) -> Tensor:
        numbers = torch.randn(sum(v.numel() for v in self.variables), generator=torch.Generator().manual_seed(seed))
        return functional.normalize(numbers.to(self.variables[0]), dim=0)

    def __call__(self, v: Tensor) -> Tensor:
        pieces = v.split([variable.numel() for variable in self.variables])
        direction = [piece.view_as(variable) for piece, variable in zip(pieces, self.variables, strict=True)]
        total = torch.zeros_like(v)
        for part in self.batch.parts():
            total += torch.cat([product.reshape(-1) for product in self._of_part(part, direction)])
        return total

    def _of_part(self, part: Tensor, direction: list[Tensor]) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(part, self.variables, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True)]).sum()
        if not slope.requires_grad:  # linear in all of them
            return tuple(map(torch.zeros_like, self.variables))
        return torch.autograd.grad(slope, self.variables, materialize_grads=True)


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    layers = quantizable_layers(model).values()
    # Fused attention has no second derivative.
    with faithful(layers), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        for quantizer in {layer.get_submodule("input_quantizer") for layer in layers if "input_quantizer" in layer._modules}:
            stack.enter_context(quantizer.register_forward_hook(_straight_through))
        yield


def _straight_through(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output, as a linear function of the input with the slopes that the quantizer's backward pass gives it."""
    x = inputs[0]
    if not (x.requires_grad and output.requires_grad):
        return output.detach()
    (slopes,) = torch.autograd.grad(output.sum(), x)
    return output.detach() + slopes * (x - x.detach())  # adds an exact zero
