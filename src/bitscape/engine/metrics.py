"""What tasks count: sums over samples, which add up over batches and workers, and the numbers made
of them.

top1, top5        percent of samples whose label has the largest, or one of the five largest logits
mean_iou          percent: intersection over union of each class among all positions, mean over the classes that occur
accuracy          percent of positions, or of answers of yes or no, that are right
relative_error    norm of the difference over the norm of what is followed, mean over the outputs
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitscape.errors import BitscapeError

RECORDED = ("epoch", "loss", "gradient_norm", "lr", "images", "train_s")
"""Names that the loop's records use."""


class Metric(Protocol):
    """What is counted; `name` is the number that tells how good a network is."""

    @property
    def name(self) -> str:
        """A key of `numbers`."""
        ...

    def sums(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """Return what a batch adds up, float64 (any number of values)."""
        ...

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Return the numbers that the sums over all batches make."""
        ...


@dataclass(frozen=True)
class TopK:
    """Of logits (n, k) and labels (n,), or probabilities (n, k)."""

    name: str = field(default="top1", init=False)

    def sums(self, outputs: Tensor, targets: Tensor, samples: int) -> Tensor:
        """Samples right by the largest logit, by the five largest, and all."""
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        hits = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == labels[:, None]
        return torch.stack(
            [hits[:, 0].sum(), hits.sum(), hits.new_full((), samples, dtype=torch.int64)]
        ).double()

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Percentages."""
        first, among_five, samples = sums.tolist()
        return {"top1": 100 * first / samples, "top5": 100 * among_five / samples}


@dataclass(frozen=True)
class MeanIou:
    """Of logits (n, k, ...) and a label for each position (n, ...), or one that is left out."""

    ignored: Callable[[Tensor, int], Tensor]
    """(labels, classes) -> which of them are left out."""
    name: str = field(default="mean_iou", init=False)

    def sums(self, outputs: Tensor, targets: Tensor, samples: int) -> Tensor:
        """Positions of each class (rows) that are taken for each class (columns)."""
        classes = outputs.shape[1]
        cells = torch.where(
            self.ignored(targets, classes), classes**2, targets * classes + outputs.argmax(1)
        ).flatten()
        counts = torch.zeros(
            classes**2 + 1, dtype=torch.float64, device=outputs.device
        )  # the last one is not counted
        return counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))[:-1]

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Percentages; nan without a labelled position."""
        table = sums.reshape(math.isqrt(len(sums)), -1)
        both = table.diagonal()
        union = table.sum(0) + table.sum(1) - both
        shares = both[union > 0] / union[union > 0]
        return {
            "mean_iou": 100 * float(shares.mean()),
            "accuracy": 100 * float(both.sum() / table.sum()),
        }


@dataclass(frozen=True)
class BinaryAccuracy:
    """Of answers of yes or no, which are given above `threshold`."""

    threshold: float
    name: str = field(default="accuracy", init=False)

    def sums(self, outputs: Tensor, targets: Tensor, samples: int) -> Tensor:
        """Answers that are right, and all."""
        right = (outputs > self.threshold) == (targets.reshape(outputs.shape) > 0.5)
        return torch.stack(
            [right.sum(), right.new_full((), right.numel(), dtype=torch.int64)]
        ).double()

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """A percentage."""
        right, answers = sums.tolist()
        return {"accuracy": 100 * right / answers}


@dataclass(frozen=True)
class RelativeError:
    """Of outputs by name, (n, values) each, and of what they follow."""

    outputs: tuple[str, ...]
    """Their names."""
    name: str = field(default="relative_error", init=False)

    def sums(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], samples: int
    ) -> Tensor:
        """Squared norm of the difference, and of what is followed, of each output in turn."""
        pairs = [(outputs[name].double(), targets[name].double()) for name in self.outputs]
        return torch.stack(
            [part.square().sum() for output, target in pairs for part in (output - target, target)]
        )

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Ratios: the mean, and each output's where there are several."""
        errors = {
            name: math.sqrt(difference / norm)
            if norm
            else math.inf * difference
            if difference
            else 0.0
            for name, (difference, norm) in zip(
                self.outputs, sums.reshape(-1, 2).tolist(), strict=True
            )
        }
        several = (
            {f"relative_error.{name}": error for name, error in errors.items()}
            if len(errors) > 1
            else {}
        )
        return {"relative_error": sum(errors.values()) / len(errors), **several}


@dataclass(frozen=True)
class Averaged:
    """The user's function of outputs and targets, averaged over samples."""

    function: Callable[[Any, Any], Any]

    @property
    def name(self) -> str:
        """Name of the function; "metric" for one without, or with a name that records use."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return "metric" if name == "<lambda>" or name in RECORDED else name

    def sums(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """The value times the samples it is the mean of, and their number."""
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor | float | int):
            raise BitscapeError(
                f"metric: it returns {type(value).__name__}; it must return a number, or a tensor "
                "() or (n,)"
            )
        mean = torch.as_tensor(value).detach().double().mean()
        return torch.stack([mean * samples, torch.full_like(mean, samples)])

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """The mean."""
        total, samples = sums.tolist()
        return {self.name: total / samples}


@dataclass(frozen=True)
class OnlyLoss:
    """Nothing beside the loss."""

    name: str = field(default="loss", init=False)

    def sums(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """Nothing."""
        return torch.zeros(0, dtype=torch.float64)

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Collected:
    """The user's metric with `update(outputs, targets)` and `compute()`, such as one of
    torchmetrics: over whole data sets only.
    """

    metric: Any

    @property
    def name(self) -> str:
        """Name of its class."""
        return type(self.metric).__name__

    def sums(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """Nothing: it is no sum over batches."""
        return torch.zeros(0, dtype=torch.float64)

    def numbers(self, sums: Tensor) -> dict[str, float]:
        """Nothing."""
        return {}

    def begun(self, device: torch.device) -> Any:
        """Return a fresh copy of the metric, on the device if it can be moved."""
        metric = copy.deepcopy(self.metric)
        return metric.to(device) if callable(getattr(metric, "to", None)) else metric

    def computed(self, metric: Any) -> dict[str, float]:
        """Return what the copy computes; of several numbers the first one is the metric."""
        value = metric.compute()
        if isinstance(value, Mapping):
            numbers = {
                str(name): float(item)
                for name, item in value.items()
                if torch.as_tensor(item).numel() == 1
            }
            if not numbers:
                raise BitscapeError(
                    f"metric: {self.name}.compute() returns no single number; pick one of them in "
                    "a metric of your own"
                )
            return {self.name: next(iter(numbers.values())), **numbers}
        return {self.name: float(value)}


def metric_of(metric: Any) -> Metric:
    """Return the user's metric: a function, or an object with `update` and `compute`. Raises
    BitscapeError for others.
    """
    if isinstance(metric, type):
        raise BitscapeError(
            f"metric is the class {metric.__name__}; give an instance, or a function (outputs, "
            "targets) -> number"
        )
    if callable(getattr(metric, "update", None)) and callable(getattr(metric, "compute", None)):
        return Collected(metric)
    if callable(metric):
        return Averaged(metric)
    raise BitscapeError(
        f"metric is {metric!r}; it must be a function (outputs, targets) -> number, or an object "
        "with "
        "update(outputs, targets) and compute()"
    )
