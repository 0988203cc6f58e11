"""Learning a float network's outputs, without targets."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count
from bitscape.data.samples import Samples
from bitscape.engine.dense import Dense
from bitscape.engine.task import Classes, Task
from bitscape.models.modes import evaluating
from bitscape.quant.convert import batches_of
from bitscape.quant.once import weights_quantized_once
from bitscape.sharpness.probe import BatchLoss


def outputs_on(network: nn.Module, samples: Samples, task: Task) -> list[Tensor]:
    """What the task compares of the network's outputs, in eval mode, batch after batch.

    Samples of several shapes may have outputs of several sizes.
    """
    with evaluating(network), weights_quantized_once(network):
        return [
            task.outputs(call(network, inputs), sample_count(inputs))
            for inputs in batches_of(samples, network)
        ]


@dataclass(frozen=True)
class FollowFloat:
    """The task's divergence from the float network's outputs: learning without targets, on any inputs.

    It is the mean over samples, and over the values of each where they are answers by themselves, as
    losses of tasks are: sums over maps of outputs would need learning rates of their own.
    """

    teacher: nn.Module
    task: Task

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Run the float network once on `inputs`."""
        samples = sample_count(inputs)
        with evaluating(self.teacher):
            followed = self.task.outputs(call(self.teacher, inputs), samples)
        answers = 1 if isinstance(self.task, Classes | Dense) else followed[0].numel()

        def loss(outputs: Any, _: Any) -> Tensor:
            return self.task.divergence(self.task.outputs(outputs, samples), followed).mean() / answers

        return loss
