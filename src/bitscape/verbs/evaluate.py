"""bs.evaluate: a network and the user's data in; the numbers of its task, or of the user's metric,
out.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitscape.data.epochs import Rows, first_of
from bitscape.engine.evaluate import Evaluation, known_labels, measured
from bitscape.engine.forward import samples_at_once
from bitscape.engine.task import Task, TaskName
from bitscape.engine.user_task import User
from bitscape.signatures import checked
from bitscape.verbs.arguments import read_epochs, stated_task, users_function


@checked
def evaluate(
    network: nn.Module,
    data: Any,
    *,
    task: TaskName | Literal["auto"] | Task = "auto",
    metric: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    reference: nn.Module | None = None,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Return how good a network is, in eval mode, on the device where it is.

    Every module's training flag has its former value afterwards.

        classes   top1 and top5, percent of samples; loss, mean cross entropy in nats
        dense     mean_iou, percent, mean over the classes that occur; accuracy, percent of labelled positions; loss
        binary    accuracy, percent of answers; loss
        follow    relative_error, norm of the difference over the norm of what is followed, mean over the outputs, each
                  output's by name; loss, half the squared difference in units of what is followed
        yours     `metric` and `loss` as you give them

    Args:
        network: any network, float or quantized.
        data: as for `train`; a generator serves one call.
        task: what the outputs are, see `train`; "auto" looks at the first batch.
        metric: in place of the task's: a function (outputs, targets) -> a number or a value for
            each sample (n,), averaged over samples; or an object with update(outputs, targets) and
            compute(), such as one of torchmetrics, of which a copy is used. Both get outputs as the
            network returns them.
        loss: function (outputs, targets) -> a scalar or a value for each sample (n,), averaged over
            samples.
        reference: float network whose outputs take the place of the targets; "auto" then follows
            it.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        targets: from a batch to what the outputs are compared with; see `BatchReader`.
        batch_size: samples at once, of tensors and datasets; None = 128, or fewer where the network's
            outputs on the way are large.
        autocast: None = float32; or torch.bfloat16.
        channels_last: memory format of the convolutions, in which the network is left; None = as it
            is.
        seed: of what data sets and loaders draw.

    Raises:
        NonFiniteError: outputs or a loss that are not finite.
        BitscapeError: data, outputs or targets that cannot be used.
    """
    if loss is not None:
        loss = users_function(loss)
    batches = read_epochs(network, data, inputs, targets, batch_size=batch_size, seed=seed)
    if batch_size is None and isinstance(batches, Rows):
        few = first_of(replace(batches, batch_size=2))
        fitting = samples_at_once(network, few.inputs, most=batches.batch_size)
        batches = replace(batches, batch_size=fitting)
    if metric is not None:
        meaning: Task = User(loss, metric)
    else:
        meaning = stated_task(network, first_of(batches), task, loss=loss, reference=reference)
        if loss is not None and not isinstance(meaning, User):
            meaning = User(loss)
    return measured(
        network,
        batches,
        meaning,
        reference=reference,
        autocast=autocast,
        channels_last=channels_last,
        highest_label=known_labels(meaning, batches),
    )
