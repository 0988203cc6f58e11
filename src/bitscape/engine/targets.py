"""Targets as tasks look at them: one tensor, and the highest label."""

from typing import Any

from torch import Tensor

from bitscape.errors import BitscapeError


def target_tensor(what: str, targets: Any) -> Tensor:
    """Return the targets, which are called `what` in messages.

    Raises BitscapeError unless they are one tensor.
    """
    if targets is None:
        raise BitscapeError(
            f"data: a batch has no {what} (no labels or targets); give (input, label) pairs, or "
            "pass targets=, a function from a batch"
        )
    if not isinstance(targets, Tensor):
        raise BitscapeError(
            f"targets are a {type(targets).__name__}, and the task needs one tensor of {what}; "
            "pass targets=, or loss="
        )
    return targets


def highest_of(labels: Tensor) -> int:
    """Return the highest label, -1 for none and on a GPU. Raises BitscapeError for one below 0."""
    if labels.is_cuda or not labels.numel():  # a look at a GPU waits for it
        return -1
    if int(labels.min()) < 0:
        raise BitscapeError(
            f"data: it has the label {int(labels.min())}; labels count from 0: leave those "
            "samples out"
        )
    return int(labels.max())
