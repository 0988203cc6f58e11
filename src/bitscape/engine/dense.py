"""Dense classes: a class at every position, such as a pixel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitscape.engine.forward import check_highest
from bitscape.engine.metrics import MeanIou, Metric
from bitscape.engine.outputs import (
    as_logits_of,
    finite,
    not_finite,
    one_tensor,
    softmax_divergence,
    softmax_roots,
)
from bitscape.engine.targets import highest_of, target_tensor
from bitscape.errors import BitscapeError

IGNORED = (255, -100)
"""Labels of positions that are left out; 255 is a class where there are more."""


@dataclass(frozen=True)
class Dense:
    """Logits of classes at every position, such as a pixel."""

    probabilities: bool = False
    """Whether the outputs went through a softmax already; their logarithms are the logits."""
    name: str = "dense"

    @property
    def metric(self) -> Metric:
        """Mean intersection over union."""
        return MeanIou(_ignored)

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return finite float32 logits (n, k >= 2, ...)."""
        return finite(self.read(output, samples))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL of the softmax, mean over the positions of each image, (n,)."""
        return softmax_divergence(outputs, reference).sum(1).flatten(1).mean(1)

    def answers(self, outputs: Tensor) -> Tensor:
        """The most likely class at every position, int64 (n, ...)."""
        return outputs.argmax(1)

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """Logits weighted by `softmax_roots` at each position, (draws, n): the sum over the root of
        their number, for squares to be averages.
        """
        by_position = (outputs * softmax_roots(outputs, draws, generator)).sum(2).flatten(2)
        return by_position.sum(2) / math.sqrt(by_position.shape[2])

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())

    def read(self, output: Any, samples: int, highest_label: int = -1) -> Tensor:
        """Return float32 logits (n, k, ...), k above the highest label."""
        logits = one_tensor(output, samples)
        if logits.ndim < 3 or logits.shape[1] < 2:
            raise BitscapeError(
                f"task='dense': the model returns shape {tuple(logits.shape)}; allowed: (n, "
                "classes, positions) or (n, classes, h, w); "
                "use another task, e.g. task='classes' for (n, classes)"
            )
        check_highest(highest_label, logits.shape[1])
        return as_logits_of(logits, probabilities=self.probabilities)

    def read_targets(self, targets: Any, samples: int) -> tuple[Tensor, int]:
        """Return labels, int64 (n, ...)."""
        labels = target_tensor("labels", targets)
        if labels.is_floating_point():
            raise BitscapeError(
                f"targets are {labels.dtype}; task 'dense' needs a whole number at each position; "
                "give loss= for others"
            )
        labels = labels.long()
        return labels, highest_of(labels[(labels != IGNORED[0]) & (labels != IGNORED[1])])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, mean over all labelled positions, in nats; 0 without one."""
        ignored = _ignored(_same_positions(targets, outputs), outputs.shape[1])
        total = functional.cross_entropy(
            outputs,
            targets.masked_fill(ignored, IGNORED[1]),
            ignore_index=IGNORED[1],
            reduction="sum",
        )
        return total / (~ignored).sum().clamp(min=1)

    def weight(self, outputs: Tensor, targets: Tensor, samples: int) -> Tensor:
        """All positions but those of the ignored labels."""
        return (~_ignored(targets, outputs.shape[1])).sum()

    def broken(self, outputs: Tensor) -> Tensor:
        """Return which images' logits are not finite."""
        return not_finite(outputs)


def _ignored(labels: Tensor, classes: int) -> Tensor:
    return (labels == IGNORED[1]) | (
        (labels == IGNORED[0])
        if classes <= IGNORED[0]
        else torch.zeros_like(labels, dtype=torch.bool)
    )


def _same_positions(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape != (len(logits), *logits.shape[2:]):
        raise BitscapeError(
            f"targets have shape {tuple(labels.shape)}, the model's logits {tuple(logits.shape)}; "
            f"task 'dense' needs labels {(len(logits), *logits.shape[2:])}: resize labels or logits"
        )
    return labels
