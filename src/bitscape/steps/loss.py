"""Cross entropy, with optional label smoothing and a teacher's logits to follow.

Paper     Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2;
          label smoothing: Szegedy et al., arXiv 1512.00567, section 7.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from bitscape.calling import Inputs, call, sample_count
from bitscape.engine import BatchLoss
from bitscape.engine.outputs import are_probabilities, as_logits_of
from bitscape.engine.task import CLASSES
from bitscape.errors import BitscapeError
from bitscape.models.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`(1 - distillation) * cross entropy + distillation * temperature^2 * KL(teacher || student)`."""

    label_smoothing: float = 0.0
    """Probability spread evenly over all classes, in [0, 1)."""
    teacher: nn.Module | None = None
    """Network whose logits are followed, on the student's device; runs in eval mode, without gradients."""
    distillation: float = 0.0
    """Weight of the teacher's term, in [0, 1]; above 0 exactly when there is a teacher."""
    temperature: float = 1.0
    """Divides both networks' logits in the teacher's term; > 0."""

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0.0 <= self.label_smoothing < 1.0:
            raise BitscapeError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1), usually 0.1")
        if not 0.0 <= self.distillation <= 1.0:
            raise BitscapeError(f"distillation is {self.distillation}; it must be in [0, 1]")
        if not 0.0 < self.temperature < math.inf:
            raise BitscapeError(f"temperature is {self.temperature}; it must be > 0")
        if (self.teacher is None) != (self.distillation == 0.0):
            given = "no teacher" if self.teacher is None else "a teacher"
            raise BitscapeError(f"distillation is {self.distillation} with {given}; give both or neither")

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Run the teacher once on `inputs`, e.g. (n, c, h, w); return the loss of student logits and labels."""
        taught = None if self.teacher is None else _teacher_logits(self.teacher, inputs)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            value = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            if taught is None:
                return value
            followed = distillation_loss(logits, taught, self.temperature)
            return (1.0 - self.distillation) * value + self.distillation * followed

        return loss


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return `temperature^2 * KL(teacher || student)`, the mean over the rows of both (n, classes), in nats.

    The factor keeps the gradient's size when the temperature changes (Hinton et al., section 2).
    """
    if logits.shape != teacher_logits.shape:
        raise BitscapeError(
            f"the teacher's logits have shape {tuple(teacher_logits.shape)}, the student's {tuple(logits.shape)}; "
            "the teacher must have the student's classes"
        )
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _teacher_logits(teacher: nn.Module, inputs: Inputs) -> Tensor:
    with evaluating(teacher):
        outputs = CLASSES.read(call(teacher, inputs), sample_count(inputs))
        return as_logits_of(outputs, probabilities=are_probabilities(outputs))
