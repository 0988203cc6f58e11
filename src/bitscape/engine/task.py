"""What a network's outputs mean: how far two sets of outputs are apart, what is learned, and what
is measured.

    classes   logits, or the probabilities of a softmax, (n, k), k >= 2: Kullback-Leibler divergence; cross entropy of labels
    dense     either (n, k, ...): the same at every position, averaged; labels (n, ...), 255 and -100 are left out
    binary    logits, or the probabilities of a final sigmoid, of any shape (n, ...): the same for each yes or no
    follow    any outputs, nested ones too: half the squared difference, each tensor in units of its own spread
    User      any outputs, with the user's own loss and metric

A squared gradient of `drawn_losses` is, in expectation, the diagonal of the matrix that `divergence`
has as its second derivative at the float outputs: the Fisher information, or Gauss-Newton's
approximation for `follow`. No labels are drawn: with random signs on the columns of a square root
of that matrix (`softmax_roots`) the squares vary less.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.calling import Inputs, call, first_rows, map_tensors, sample_count
from bitscape.engine.dense import Dense
from bitscape.engine.forward import as_logits
from bitscape.engine.metrics import BinaryAccuracy, Metric, RelativeError, TopK
from bitscape.engine.outputs import (
    are_probabilities,
    as_logits_of,
    drawn_signs,
    finite,
    floating,
    not_finite,
    one_tensor,
    only_tensor,
    per_sample,
    rows_by_name,
    softmax_divergence,
    softmax_roots,
    spreads_of,
)
from bitscape.engine.targets import highest_of, target_tensor
from bitscape.errors import BitscapeError, nearest
from bitscape.models.modes import evaluating

TaskName = Literal["classes", "dense", "binary", "follow"]
FEW = 7
"""Images whose outputs tell what they are: their graph is kept. An uncommon number, which no output has by chance."""
SAMPLE = 64
"""Images whose outputs determine the spread."""
_BACKWARD = re.compile(r"Backward\d*$")
_MOVES = {
    "Alias", "AsStrided", "Cat", "Clamp", "ClampMax", "ClampMin", "Clone", "Expand", "Flip",
    "Index", "IndexSelect", "Permute", "ReshapeAlias", "Select", "Slice", "Split",
    "SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView",
    "Unsqueeze", "View",
}
"""Operations, by the names of their gradients, behind which a probability stays one."""


@runtime_checkable
class Task(Protocol):
    """What outputs mean.

    Scores look at `outputs`; training and evaluation at what `read` returns.
    """

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def metric(self) -> Metric:
        """What is measured."""
        ...

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return finite float32 outputs (n, ...) of a network for `samples` inputs; a BitscapeError
        says what else came out.
        """
        ...

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """How far each sample's outputs are from the reference, (n,)."""
        ...

    def answers(self, outputs: Tensor) -> Tensor | None:
        """Return the class, or yes or no, that `outputs` say, of each sample or position; None where
        they are values.
        """
        ...

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """Return losses of each sample (draws, n) whose squared gradients expect to the curvature
        of `divergence`.

        A loss of which nothing is drawn comes once, (1, n).
        """
        ...

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """Return a loss of each sample (n,) whose second derivative is that curvature, which is
        never negative.
        """
        ...

    def read(self, output: Any, samples: int, highest_label: int = -1) -> Any:
        """Return what `loss` and `metric` take of a network's output; a BitscapeError says what
        else came out.
        """
        ...

    def read_targets(self, targets: Any, samples: int) -> tuple[Any, int]:
        """Return the targets of `samples` inputs as `loss` and `metric` take them, and the highest
        label, -1 for none.

        Raises BitscapeError for others.
        """
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return what training lowers: a scalar, the mean over samples (over labelled positions for
        dense).
        """
        ...

    def weight(self, outputs: Any, targets: Any, samples: int) -> Tensor | int:
        """Return how many samples or positions `loss` is the mean of."""
        ...

    def broken(self, outputs: Any) -> Tensor:
        """Return for each sample (n,) whether its outputs are not finite."""
        ...


@dataclass(frozen=True)
class Classes:
    """Logits of classes that exclude each other."""

    probabilities: bool = False
    """Whether the outputs went through a softmax already; their logarithms are the logits."""
    name: TaskName = "classes"

    @property
    def metric(self) -> Metric:
        """Top-1 and top-5 accuracy."""
        return TopK()

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return finite float32 logits (n, k >= 2)."""
        logits = self.read(output, samples)
        if logits.shape[1] < 2:
            raise BitscapeError(
                "task='classes': a softmax over one output is always 1; use task='follow' or "
                "'binary'"
            )
        return finite(logits)

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL(softmax(reference) || softmax(outputs)) of each image, (n,)."""
        return softmax_divergence(outputs, reference).sum(1)

    def answers(self, outputs: Tensor) -> Tensor:
        """The most likely class of each image, int64 (n,)."""
        return outputs.argmax(1)

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """Logits of each image weighted by `softmax_roots`, (draws, n)."""
        return (outputs * softmax_roots(outputs, draws, generator)).sum(2)

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())

    def read(self, output: Any, samples: int, highest_label: int = -1) -> Tensor:
        """Return float32 logits (n, k), k above the highest label."""
        values = as_logits(only_tensor(output), samples, highest_label)
        return as_logits_of(values, probabilities=self.probabilities)

    def read_targets(self, targets: Any, samples: int) -> tuple[Tensor, int]:
        """Return labels, int64 (n,), or probabilities (n, k)."""
        labels = target_tensor("labels", targets)
        if labels.ndim == 2 and (labels.is_floating_point() or _yes_or_no(labels)):
            return labels.float(), labels.shape[1] - 1
        if labels.is_floating_point() or labels.ndim != 1:
            raise BitscapeError(
                f"targets are {labels.dtype} of shape {tuple(labels.shape)}; task 'classes' needs "
                "whole numbers (n,), or "
                "probabilities (n, classes); use another task, or give loss="
            )
        return labels.long(), highest_of(labels)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, in nats."""
        return functional.cross_entropy(outputs, targets)

    def weight(self, outputs: Tensor, targets: Tensor, samples: int) -> int:
        """All samples."""
        return samples

    def broken(self, outputs: Tensor) -> Tensor:
        """Return which images' logits are not finite."""
        return not_finite(outputs)


@dataclass(frozen=True)
class Binary:
    """Answers to questions of yes or no, each by itself."""

    probabilities: bool = False
    """Whether the outputs went through a sigmoid already."""
    name: TaskName = "binary"

    @property
    def metric(self) -> Metric:
        """Accuracy over all answers."""
        return BinaryAccuracy(self._threshold)

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return finite float32 outputs (n, ...)."""
        return finite(self.read(output, samples))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL of the Bernoulli distributions of each image, summed over its outputs, (n,)."""
        outputs, reference = self._logits(outputs), self._logits(reference)
        share = reference.sigmoid()
        yes = share * (functional.logsigmoid(reference) - functional.logsigmoid(outputs))
        no = (1 - share) * (functional.logsigmoid(-reference) - functional.logsigmoid(-outputs))
        return per_sample(yes + no)

    def answers(self, outputs: Tensor) -> Tensor:
        """Whether each output says yes, bool in their shape."""
        return outputs > self._threshold

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """Sum of each image's logits, (draws, n), times the deviations of their answers, with signs
        drawn at random.
        """
        logits = self._logits(outputs)
        share = logits.detach().sigmoid()
        return _signed_sums(logits * (share * (1 - share)).sqrt(), draws, generator)

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())

    def read(self, output: Any, samples: int, highest_label: int = -1) -> Tensor:
        """Return float32 outputs (n, ...)."""
        return one_tensor(output, samples)

    def read_targets(self, targets: Any, samples: int) -> tuple[Tensor, int]:
        """Return answers, float32 (n, ...), from 0 (no) to 1 (yes)."""
        answers = target_tensor("answers", targets).float()
        if (
            answers.numel()
            and not answers.is_cuda
            and not 0 <= float(answers.min()) <= float(answers.max()) <= 1
        ):
            raise BitscapeError(
                f"targets are from {float(answers.min()):g} to {float(answers.max()):g}; task "
                "'binary' needs 0 or 1"
            )
        return answers, -1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy, mean over all answers, in nats."""
        if targets.numel() != outputs.numel():
            raise BitscapeError(
                f"targets have shape {tuple(targets.shape)}, the model's outputs "
                f"{tuple(outputs.shape)}; task 'binary' needs as many"
            )
        return functional.binary_cross_entropy_with_logits(
            self._logits(outputs), targets.reshape(outputs.shape)
        )

    def weight(self, outputs: Tensor, targets: Tensor, samples: int) -> int:
        """All samples."""
        return samples

    def broken(self, outputs: Tensor) -> Tensor:
        """Return which samples' outputs are not finite."""
        return not_finite(outputs)

    @property
    def _threshold(self) -> float:
        return 0.5 if self.probabilities else 0.0

    def _logits(self, outputs: Tensor) -> Tensor:
        if not self.probabilities:
            return outputs
        smallest = torch.finfo(outputs.dtype).eps
        return outputs.clamp(smallest, 1 - smallest).logit()


@dataclass(frozen=True)
class Follow:
    """Any outputs: they should stay what they are, or become what the targets are."""

    spreads: Mapping[str, float] = field(default_factory=dict)
    """Name of each floating-point output of the float network -> its standard deviation, the unit
    of its differences.
    """
    name: TaskName = "follow"

    @property
    def metric(self) -> Metric:
        """Relative error of the outputs."""
        return RelativeError(tuple(self.spreads))

    def outputs(self, output: Any, samples: int) -> Tensor:
        """Return all floating-point outputs in their units, side by side: finite float32 (n, values
        of an image).
        """
        return finite(self._in_units(self.read(output, samples)))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Half the squared difference of each image, (n,)."""
        return per_sample((outputs - reference).square()) / 2

    def answers(self, outputs: Tensor) -> None:
        """None: these are values."""

    def drawn_losses(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None, draws: int = 1
    ) -> Tensor:
        """Sum of each image's outputs (draws, n), with signs drawn at random."""
        return _signed_sums(outputs, draws, generator)

    def curved_loss(
        self, outputs: Tensor, generator: torch.Generator, targets: Any = None
    ) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())

    def read(self, output: Any, samples: int, highest_label: int = -1) -> dict[str, Tensor]:
        """Return every floating-point output by name, float32 (n, values of an image)."""
        rows = rows_by_name(output, samples)
        if self.spreads and rows.keys() != self.spreads.keys():
            raise BitscapeError(
                f"the model returns {', '.join(rows)}, and {', '.join(self.spreads)} before; its "
                "outputs must not change"
            )
        return rows

    def read_targets(self, targets: Any, samples: int) -> tuple[dict[str, Tensor], int]:
        """Return what is followed by name, float32 (n, values of an image): tensors in the
        structure of the outputs.
        """
        if targets is None:
            raise BitscapeError(
                "data: task 'follow' needs what to follow; pass reference=, the float network, "
                "or data with targets"
            )
        followed = targets.float() if isinstance(targets, Tensor) else targets
        return self.read(followed, samples), -1

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Half the squared difference in units of the spread, mean over samples and values."""
        for name, output in outputs.items():
            if output.shape != targets[name].shape:
                raise BitscapeError(
                    f"output {name} has {output.shape[1]} values for each sample, and what it "
                    f"follows {targets[name].shape[1]}; "
                    "give targets of the outputs' sizes, or loss=; labels of classes are whole "
                    "numbers (n,)"
                )
        return (self._in_units(outputs) - self._in_units(targets)).square().mean() / 2

    def weight(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], samples: int
    ) -> int:
        """All samples."""
        return samples

    def broken(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return which samples have an output that is not finite."""
        return not_finite(torch.cat(list(outputs.values()), dim=1))

    def _in_units(self, rows: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(
            [tensor / self.spreads.get(name, 1.0) for name, tensor in rows.items()], dim=1
        )


def _signed_sums(values: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sums of each sample's values (draws, n), with signs drawn at random."""
    rows = values.reshape(len(values), 1, math.prod(values.shape[1:]))
    signs = drawn_signs((len(values), draws, rows.shape[2]), values, generator)
    return (rows * signs).sum(2).mT


CLASSES = Classes()


def task_of(
    model: nn.Module, images: Inputs, name: TaskName | Literal["auto"] = "auto", targets: Any = None
) -> Task:
    """Return the task of that name, or the one that the outputs suggest.

    "auto" takes (n, k >= 2) for logits of classes, one output behind a sigmoid for a yes or no, and
    follows any others. Without targets a regression of two or more values has the shape of classes,
    so that `name` must say "follow". With targets, whole numbers (n,) beside (n, k) are classes,
    (n, ...) beside (n, k, ...) dense classes, 0 and 1 beside a single output yes or no, whatever
    their type; 0 and 1 of shape (n, k) beside (n, k) are classes where each row has a single 1, and
    answers of yes or no elsewhere. All others are followed.

    Args:
        model: float network, eval mode.
        images: what it is called with, normalized, e.g. (n, c, h, w); at most 64 samples are run.
        name: which task.
        targets: of the same samples, where there are any.

    Raises:
        BitscapeError: an unknown name, or outputs that are none of the task's, or not finite.
    """
    if name not in (*get_args(TaskName), "auto"):
        raise BitscapeError(
            f"task={name!r}: allowed are 'auto', "
            f"{', '.join(map(repr, get_args(TaskName)))}{nearest(str(name), get_args(TaskName))}"
        )
    few = first_rows(images, FEW)
    count = sample_count(few)
    with evaluating(model), torch.enable_grad():
        output = call(model, tracked(few))
    if name in ("classes", "dense"):
        return _of_classes(name, output)

    def follow() -> Follow:
        with evaluating(model):
            return Follow(spreads_of(floating(call(model, first_rows(images, SAMPLE)))))

    only = output if isinstance(output, Tensor) and output.ndim and len(output) == count else None
    if name == "auto" and isinstance(targets, Tensor):
        return _by_targets(only_tensor(output), targets[:SAMPLE] if targets.ndim else targets) or follow()
    ends_in_sigmoid = only is not None and _in_sigmoid(only)
    if name == "auto" and only is not None and only.ndim == 2 and only.shape[1] > 1:
        return _of_classes("classes", only)
    if name == "binary" or (
        name == "auto" and ends_in_sigmoid and only is not None and only[0].numel() == 1
    ):
        finite(one_tensor(output, count))
        return Binary(probabilities=ends_in_sigmoid)
    return follow()


def _by_targets(output: object, targets: Tensor) -> Task | None:
    """The task of outputs for a few samples beside the targets of these and others; None for any values."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.ndim:
        return None
    whole, several = not targets.is_floating_point(), output.ndim > 1 and output.shape[1] > 1
    if whole and several and targets.ndim == 1 and output.ndim == 2:
        return _of_classes("classes", output)
    if whole and several and output.ndim > 2 and targets.shape[1:] == output.shape[2:]:
        return _of_classes("dense", output)
    in_sigmoid = _in_sigmoid(output)
    answers = targets.numel() > 0 and _yes_or_no(targets)
    if output[0].numel() == 1 and (in_sigmoid or answers):
        return Binary(probabilities=in_sigmoid)
    if answers and several and output.ndim == 2 and targets.shape[1:] == output.shape[1:]:
        one_of_each = bool((targets.sum(1) == 1).all())  # one-hot labels
        if one_of_each and not in_sigmoid:
            return _of_classes("classes", output)
        return Binary(probabilities=in_sigmoid)
    return None


def _of_classes(name: Literal["classes", "dense"], output: object) -> Classes | Dense:
    value = only_tensor(output)
    shares = isinstance(value, Tensor) and are_probabilities(value)
    return Classes(shares) if name == "classes" else Dense(shares)


def _yes_or_no(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def _in_sigmoid(output: Tensor) -> bool:
    """Whether all values come out of a sigmoid, behind which they are only moved, copied or clamped."""
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        kind = "" if node is None else _BACKWARD.sub("", node.name())
        if node is None or kind not in (*_MOVES, "Sigmoid"):
            return False
        if kind != "Sigmoid":
            nodes.extend(before for before, _ in node.next_functions)
    return True


def tracked(images: Inputs) -> Inputs:
    """The inputs with a gradient of their own, which reaches layers behind frozen ones; indices
    have none.
    """
    return map_tensors(
        lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), images
    )
