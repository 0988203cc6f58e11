"""What a network's outputs mean: how far two sets of outputs are apart, and a loss whose gradients measure that.

    classes   logits (n, k), k >= 2: Kullback-Leibler divergence of the softmax; cross entropy of labels drawn from it
    binary    logits, or the probabilities of a final sigmoid, of any shape (n, ...): the same for each yes or no
    follow    any outputs, nested ones too: half the squared difference, each tensor in units of its own spread

A squared gradient of `drawn_loss` is, in expectation, the diagonal of the matrix that `divergence` has as its second derivative at
the float outputs: the Fisher information, or Gauss-Newton's approximation for `follow`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.calling import Inputs, call, map_tensors, rows_of, sample_count
from bitscape.engine.forward import as_logits
from bitscape.errors import BitscapeError
from bitscape.models.modes import evaluating
from bitscape.models.named_outputs import named_outputs

TaskName = Literal["classes", "binary", "follow"]
SAMPLE = 64
"""Images whose outputs determine the spread."""
CONSTANT = 1e-6
"""Outputs that spread less than this share of the largest are constant but for rounding."""


@dataclass(frozen=True)
class Classes:
    """Logits of classes that exclude each other."""

    name: TaskName = "classes"

    def outputs(self, output: object, images: int) -> Tensor:
        """Return finite float32 logits (n, k >= 2); a BitscapeError says what else came out."""
        logits = as_logits(output, images, highest_label=-1)
        if logits.shape[1] < 2:
            raise BitscapeError("task='classes': a softmax over one output is always 1; use task='follow' or 'binary'")
        return _finite(logits)

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL(softmax(reference) || softmax(outputs)) of each image, (n,)."""
        pair = outputs.log_softmax(1), reference.log_softmax(1)
        return functional.kl_div(*pair, log_target=True, reduction="none").sum(1)

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """Cross entropy of each image (n,), for labels drawn from the softmax."""
        return functional.cross_entropy(outputs, drawn_labels(outputs, generator), reduction="none")

    def curved_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """Loss of each image (n,) whose second derivative is the curvature."""
        return self.drawn_loss(outputs, generator)


@dataclass(frozen=True)
class Binary:
    """Answers to questions of yes or no, each by itself."""

    probabilities: bool = False
    """Whether the outputs went through a sigmoid already."""
    name: TaskName = "binary"

    def outputs(self, output: object, images: int) -> Tensor:
        """Return finite float32 outputs (n, ...)."""
        return _finite(_one_tensor(output, images))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL of the Bernoulli distributions of each image, summed over its outputs, (n,)."""
        outputs, reference = self._logits(outputs), self._logits(reference)
        share = reference.sigmoid()
        yes = share * (functional.logsigmoid(reference) - functional.logsigmoid(outputs))
        no = (1 - share) * (functional.logsigmoid(-reference) - functional.logsigmoid(-outputs))
        return _per_image(yes + no)

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """Cross entropy of each image (n,), for answers drawn by the outputs' own probabilities."""
        logits = self._logits(outputs)
        chances = torch.rand(logits.shape, dtype=torch.float32, generator=generator).to(logits.device)
        answers = (chances < logits.detach().sigmoid()).to(logits.dtype)
        return _per_image(functional.binary_cross_entropy_with_logits(logits, answers, reduction="none"))

    def curved_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())

    def _logits(self, outputs: Tensor) -> Tensor:
        if not self.probabilities:
            return outputs
        smallest = torch.finfo(outputs.dtype).eps
        return outputs.clamp(smallest, 1 - smallest).logit()


@dataclass(frozen=True)
class Follow:
    """Any outputs: they should stay what they are."""

    spreads: Mapping[str, float] = field(default_factory=dict)
    """Name of each floating-point output of the float network -> its standard deviation, the unit of its differences."""
    name: TaskName = "follow"

    def outputs(self, output: object, images: int) -> Tensor:
        """Return all floating-point outputs in their units, side by side: finite float32 (n, values of an image)."""
        named = _floating(output)
        if self.spreads and named.keys() != self.spreads.keys():
            raise BitscapeError(f"the model returns {', '.join(named)}, and {', '.join(self.spreads)} before; its outputs must not change")
        columns = [_rows(name, tensor, images) / self.spreads.get(name, 1.0) for name, tensor in named.items()]
        return _finite(torch.cat(columns, dim=1))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Half the squared difference of each image, (n,)."""
        return _per_image((outputs - reference).square()) / 2

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """Sum of each image's outputs (n,), with signs drawn at random."""
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        return _per_image(outputs * signs)

    def curved_loss(self, outputs: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
        """The divergence from the outputs' own values (n,): flat here, and curved."""
        return self.divergence(outputs, outputs.detach())


Task = Classes | Binary | Follow


def task_of(model: nn.Module, images: Inputs, name: TaskName | Literal["auto"] = "auto") -> Task:
    """Return the task of that name, or the one that the outputs suggest.

    "auto" takes (n, k >= 2) for logits of classes, one output behind a sigmoid for a yes or no, and follows any others:
    a regression of two or more values has the shape of classes, so that `name` must say "follow".

    Args:
        model: float network, eval mode.
        images: what the network is called with; at most 64 samples are run.
        name: which task.

    Raises:
        BitscapeError: the outputs are none of the task's, or not finite.
    """
    if name == "classes":
        return Classes()
    sample = rows_of(images, slice(0, SAMPLE), sample_count(images))
    samples = sample_count(sample)
    with evaluating(model), torch.enable_grad():
        output = call(model, tracked(sample))
    only = output if isinstance(output, Tensor) and output.ndim and len(output) == samples else None
    ends_in_sigmoid = only is not None and only.grad_fn is not None and only.grad_fn.name() == "SigmoidBackward0"
    if name == "auto" and only is not None and only.ndim == 2 and only.shape[1] > 1:
        return Classes()
    if name == "binary" or (name == "auto" and ends_in_sigmoid and only is not None and only[0].numel() == 1):
        _finite(_one_tensor(output, samples))
        return Binary(probabilities=ends_in_sigmoid)
    return Follow({key: _spread(tensor) for key, tensor in _floating(output).items()})


def _spread(tensor: Tensor) -> float:
    values = tensor.detach().double()
    spread, largest = float(values.std(unbiased=False)), float(values.abs().max())
    return spread if spread > CONSTANT * largest else 1.0


def _floating(output: object) -> dict[str, Tensor]:
    """The floating-point tensors among a network's outputs, by name."""
    named = {name: tensor for name, tensor in named_outputs(output).items() if tensor.is_floating_point() and tensor.numel()}
    if not named:
        raise BitscapeError("the model returns no floating-point tensor; scores need one: return it beside the others, or use method local")
    return named


def _rows(name: str, tensor: Tensor, images: int) -> Tensor:
    """A row of values for each image: detectors may lay the cells of all images end to end."""
    if tensor.numel() % images:
        raise BitscapeError(
            f"the model's output {name} has shape {tuple(tensor.shape)} for {images} images, which is not so many values for each; "
            "use method local, which does not look at outputs"
        )
    return tensor.float().reshape(images, -1)


def tracked(images: Inputs) -> Inputs:
    """The inputs with a gradient of their own, which reaches layers behind frozen ones; indices have none."""
    return map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), images)


def drawn_labels(logits: Tensor, generator: torch.Generator, targets: Any = None) -> Tensor:
    """Labels (n,) drawn from the softmax of `logits` (n, classes), on the CPU so that every device draws the same."""
    return torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def _one_tensor(output: object, images: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise BitscapeError(f"the model returns {type(output).__name__}; scores need one tensor (n, ...): wrap it, or use method local")
    if output.ndim == 0 or len(output) != images:
        raise BitscapeError(f"the model returns shape {tuple(output.shape)} for {images} images; scores need (n, ...), or use method local")
    if not output.is_floating_point():
        raise BitscapeError(
            f"the model returns {output.dtype}, as of classes; scores need logits or other values: return those, or use method local"
        )
    return output.float()


def _finite(outputs: Tensor) -> Tensor:
    broken = ~outputs.flatten(1).isfinite().all(1) if outputs.ndim > 1 else ~outputs.isfinite()
    if bool(broken.any()):
        raise BitscapeError(
            f"the model's outputs of image {int(broken.nonzero()[0])} are not finite; check the normalization of the images, "
            "or use method local, which does not look at them"
        )
    return outputs


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(len(values), math.prod(values.shape[1:])).sum(1)
