"""Adaptive rounding: every weight learns whether it goes up or down, by gradient descent on the layer's output error.

Paper     Nagel, Amjad, van Baalen, Louizos, Blankevoort: "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
          arXiv 2004.10568
Idea      Rounding is a choice of one bit a weight. A soft choice h in 0..1 is trained, and a regulariser drives it to 0 or 1.
Computes  Eq. 23 -> soft_choice; Eq. 24 -> its regulariser, beta annealed; Eq. 21 -> RoundingTask.output_error
Departs   The squared output error comes from the second moments of the layer's inputs, over all
          images at once, instead of drawn batches. It has no activation function (Eq. 25). The
          error is taken relative to that of nearest rounding, so that one weight of the regulariser
          suits every layer; the choice starts at the weight's own fraction. Moments are shrunk, and
          a layer takes compensated or nearest rounding where they do better on the half of the data
          that the choice was not trained on, as for compensated rounding.
Costs     Two products of rows x k x k a step and layer; 1000 steps, twice.
Measured  not yet
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.progress import track
from bitscape.quant.functional import without_autocast
from bitscape.quant.repair.moments import InputMoments
from bitscape.quant.repair.rounding import (
    Rounding,
    RoundingError,
    RoundingTask,
    compensations,
    log_errors,
    rounding_tasks,
)

_FREE_SHARE = 0.2
"""Share of the steps without regulariser."""
_BETA = (20.0, 2.0)
"""First and last exponent of the regulariser."""


def adaptive_rounding(
    model: nn.Module,
    moments: Mapping[str, InputMoments],
    *,
    steps: int = 1000,
    learning_rate: float = 0.02,
    push: float = 0.1,
) -> dict[str, RoundingError]:
    """Train the rounding of every weight, and write what does best on data it was not trained on.

    Args:
        model: quantized by LSQ or LSQ+; changed in place.
        moments: `input_moments` of the float network; layers without moments keep nearest rounding.
        steps: of Adam, for each layer, and for each part of the data.
        learning_rate: of the logits.
        push: weight of the regulariser, against an output error of 1 for nearest rounding; both are
            means over weights.

    Returns:
        Layer name -> squared output errors before and after.

    Raises:
        BitscapeError: settings out of range, or what `compensate_rounding` raises.
    """
    methods = adaptations(steps=steps, learning_rate=learning_rate, push=push)
    tasks = rounding_tasks(model, moments)
    with torch.no_grad(), without_autocast():
        errors = {
            name: make().round(methods)
            for name, make in track(tasks.items(), label="adaptive rounding", total=len(tasks))
        }
    log_errors("adaptive rounding", errors)
    return errors


def adaptations(
    *, steps: int = 1000, learning_rate: float = 0.02, push: float = 0.1
) -> list[Rounding]:
    """Adaptive rounding, and what replaces it where it learns too much of its own data."""
    if steps < 1 or learning_rate <= 0 or push <= 0:
        raise BitscapeError(
            f"steps = {steps}, learning_rate = {learning_rate}, push = {push}: all must be above 0"
        )

    def trained(task: RoundingTask) -> Tensor:
        return _trained_codes(task.shrunk(1.0), steps, learning_rate, push)

    return [trained, *compensations()]


def soft_choice(logits: Tensor) -> Tensor:
    """h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1) (Eq. 23): 0 rounds down, 1 up."""
    return (1.2 * logits.sigmoid() - 0.1).clamp(0.0, 1.0)


def _logits(fraction: Tensor) -> Tensor:
    """The logits whose soft choice is `fraction`."""
    return torch.logit((fraction + 0.1) / 1.2)


@torch.enable_grad()
def _trained_codes(task: RoundingTask, steps: int, learning_rate: float, push: float) -> Float[Tensor, "g r k"]:
    zero_point = task.grid.zero_point
    position = task.weight / task.scale + zero_point
    floor = position.floor()
    logits = _logits(position - floor).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    unit = task.output_error(task.real(task.nearest()) - task.weight).sum().clamp(min=1e-20)
    for step in range(steps):
        choice = soft_choice(logits)
        soft = task.real(task.held(floor + choice))
        loss = task.output_error(soft - task.weight).sum() / unit
        loss = loss + push * _indecision(choice, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        chosen = task.held(floor + (logits > 0))
        return _better_rows(task, chosen)


def _indecision(choice: Tensor, progress: float) -> Tensor:
    """Mean of 1 - |2h - 1|^beta (Eq. 24), beta annealed from 20 to 2 by a half cosine after the free steps."""
    if progress < _FREE_SHARE:
        return choice.new_zeros(())
    angle = torch.tensor((progress - _FREE_SHARE) / (1 - _FREE_SHARE) * torch.pi)
    beta = float(_BETA[1] + (_BETA[0] - _BETA[1]) * (1 + angle.cos()) / 2)
    return (1 - (2 * choice - 1).abs().pow(beta)).mean()


def _better_rows(task: RoundingTask, chosen: Tensor) -> Tensor:
    """Of the trained and the nearest codes those with the smaller output error, row by row."""
    nearest = task.nearest()
    trained_error, nearest_error = (task.output_error(task.real(c) - task.weight) for c in (chosen, nearest))
    return torch.where((trained_error < nearest_error)[:, :, None], chosen, nearest)
