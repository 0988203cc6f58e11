"""The task of a user's own loss and metric."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitscape.engine.metrics import Metric, OnlyLoss, metric_of
from bitscape.engine.task import Follow
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_in


@dataclass(frozen=True)
class User:
    """The user's own loss and metric, on outputs as the network returns them; without a loss,
    scores follow the outputs.
    """

    own_loss: Callable[[Any, Any], Tensor] | None = None
    """(outputs, targets) -> loss: a scalar, the mean over the batch, or one value for each sample
    (n,).
    """
    own_metric: Any = None
    """(outputs, targets) -> number; or an object with `update(outputs, targets)` and `compute()`.
    None: the loss.
    """
    follow: Follow = field(default_factory=Follow)
    """How far outputs are apart, which scores ask for."""
    name: str = "user"

    @property
    def metric(self) -> Metric:
        """The user's metric, or else the loss alone."""
        return OnlyLoss() if self.own_metric is None else metric_of(self.own_metric)

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return all floating-point outputs as `Follow` does; the tensor remembers in `returned`
        what the loss takes.
        """
        rows = self.follow.outputs(output, samples)
        rows.returned = output  # type: ignore[attr-defined]
        return rows

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Half the squared difference of each sample, (n,)."""
        return self.follow.divergence(outputs, reference)

    def answers(self, outputs: Tensor) -> None:
        """None: these are values."""

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """The user's loss of each sample (1, n) where there are targets; without, the sums of its
        outputs with drawn signs, (draws, n).
        """
        if targets is None or self.own_loss is None:
            return self.follow.drawn_losses(outputs, generator, draws=draws)
        return self._losses(outputs, targets)[None]

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """The user's loss less its linear part in the outputs (n,), which leaves the curvature of
        Gauss and Newton.
        """
        if targets is None or self.own_loss is None:
            return self.follow.curved_loss(outputs, generator)
        losses = self._losses(outputs, targets)
        tensors = [tensor for tensor in tensors_in(_returned(outputs)) if tensor.requires_grad]
        slopes = torch.autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
        linear = sum(
            (slope * tensor).sum()
            for slope, tensor in zip(slopes, tensors, strict=True)
            if slope is not None
        )
        return losses - linear / len(losses)

    def read(self, output: Any, samples: int, highest_label: int = -1) -> Any:
        """Return the output as it is; a tensor in float32."""
        return (
            output.float() if isinstance(output, Tensor) and output.is_floating_point() else output
        )

    def read_targets(self, targets: Any, samples: int) -> tuple[Any, int]:
        """Return the targets as they are."""
        return targets, -1

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The user's loss, its mean where it has a value for each sample."""
        if self.own_loss is None:
            raise BitscapeError(
                "loss is None, and the metric is your own; give loss=, a function (outputs, "
                "targets) -> loss"
            )
        return loss_of(self.own_loss, outputs, targets).mean()

    def weight(self, outputs: Any, targets: Any, samples: int) -> int:
        """All samples."""
        return samples

    def broken(self, outputs: Any) -> Tensor:
        """None: the metric says what it makes of them."""
        return torch.zeros(1, dtype=torch.bool)

    def _losses(self, outputs: Tensor, targets: Any) -> Tensor:
        assert self.own_loss is not None
        value = loss_of(self.own_loss, _returned(outputs), targets)
        return value if value.shape == outputs.shape[:1] else value.mean().expand(len(outputs))


def loss_of(function: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Tensor:
    """Call the user's loss. Raises BitscapeError unless it returns a floating-point tensor."""
    value = function(outputs, targets)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        shown = (
            f"{value.dtype} of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise BitscapeError(
            f"loss: it returns {shown}; it must return a floating-point tensor, () or (n,)"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise BitscapeError("loss: what it returns has no gradient; compute it from the outputs, without detach or argmax")
    return value


def _returned(outputs: Tensor) -> Any:
    return outputs.returned  # type: ignore[attr-defined]  # by User.outputs
