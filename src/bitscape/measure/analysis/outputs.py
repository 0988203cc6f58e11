"""How far quantized layers move a network's outputs: one layer alone, all but one, all together."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count
from bitscape.data.samples import Samples
from bitscape.engine.metrics import RelativeError
from bitscape.engine.outputs import rows_by_name
from bitscape.engine.task import Task
from bitscape.errors import explained_forward, prefixed
from bitscape.measure.analysis.twins import Twins
from bitscape.models.modes import evaluating
from bitscape.progress import track
from bitscape.quant.convert import batches_of
from bitscape.quant.once import weights_quantized_once


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far a network's outputs are from the float network's."""

    relative_error: float | None
    """Norm of the difference over the norm of the float outputs, mean over several outputs; None
    where a float output is zero throughout.
    """
    divergence: float
    """Of the task, mean over samples: KL in nats for classes, dense classes and yes or no; half the
    squared difference in units of each output's spread for all others.
    """
    changed: float | None
    """Share of the answers, 0 to 1, that are others: classes, or yes and no; None without."""


@dataclass(frozen=True, kw_only=True)
class NetworkErrors:
    """The errors of all states of a network that are compared with the float one."""

    whole: OutputError
    """Every layer quantized."""
    weights: OutputError
    """All weights quantized, all inputs float."""
    inputs: OutputError
    """All inputs quantized, all weights float."""
    alone: Mapping[str, OutputError]
    """Layer -> it alone quantized."""
    others: Mapping[str, OutputError]
    """Layer -> every layer quantized but this one."""


State = Callable[[], AbstractContextManager[nn.Module]]
"""Puts a network into a state, for a block."""


def output_errors(
    twins: Twins, names: Sequence[str], samples: Samples, task: Task, batch_size: int
) -> NetworkErrors:
    """Compare the outputs in every state with the float ones: 4 + 2 L passes for L layers.

    Raises:
        BitscapeError: outputs that are not finite, or that the task does not take; the state is
            named.
    """
    every = tuple(twins.layers)
    states: dict[str, State] = {
        "every layer quantized": twins.exact_in_network,
        "all weights quantized": partial(twins.quantized_in_twin, "weight", *every),
        "all inputs quantized": partial(twins.quantized_in_twin, "input", *every),
    }
    alone = {name: f"layer {name} alone quantized" for name in names}
    others = {name: f"every layer quantized but {name}" for name in names}
    states |= {alone[name]: partial(twins.quantized_in_twin, "both", name) for name in names}
    states |= {others[name]: partial(twins.exact_in_network, name) for name in names}
    sums = {state: _Sums(task) for state in states}
    running = evaluating(twins.twin), evaluating(twins.network)
    with running[0], running[1], weights_quantized_once(twins.network):
        for inputs in batches_of(samples, twins.twin, batch_size):
            reference = _Outputs.of(twins.twin, inputs, task)
            for state, entered in track(states.items(), label="analyze: outputs, pass"):
                with prefixed(state), entered() as network:
                    sums[state].add(_Outputs.of(network, inputs, task), reference)
    whole, weights, all_inputs, *_ = errors = [total.error() for total in sums.values()]
    by_state = dict(zip(states, errors, strict=True))
    return NetworkErrors(
        whole=whole,
        weights=weights,
        inputs=all_inputs,
        alone={name: by_state[state] for name, state in alone.items()},
        others={name: by_state[state] for name, state in others.items()},
    )


@dataclass(frozen=True)
class _Outputs:
    """A network's outputs for one batch."""

    by_name: Mapping[str, Tensor]
    """Every floating-point output, (n, values of a sample)."""
    of_task: Tensor
    """As the task compares them, (n, ...)."""

    @classmethod
    def of(cls, network: nn.Module, inputs: Inputs, task: Task) -> "_Outputs":
        samples = sample_count(inputs)
        with explained_forward(inputs):
            output = call(network, inputs)
        return cls(rows_by_name(output, samples), task.outputs(output, samples))


@dataclass
class _Sums:
    """Errors of one state, added up batch by batch."""

    task: Task
    metric: RelativeError = field(default=RelativeError(()), init=False)
    norms: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64), init=False)
    divergence: float = field(default=0.0, init=False)
    samples: int = field(default=0, init=False)
    changed: int = field(default=0, init=False)
    answers: int = field(default=0, init=False)

    def add(self, outputs: _Outputs, reference: _Outputs) -> None:
        samples = len(reference.of_task)
        self.metric = RelativeError(tuple(reference.by_name))
        norms = self.metric.sums(outputs.by_name, reference.by_name, samples)
        self.norms = self.norms + norms.cpu()
        self.divergence += float(self.task.divergence(outputs.of_task, reference.of_task).sum())
        self.samples += samples
        before, after = map(self.task.answers, (reference.of_task, outputs.of_task))
        if before is not None and after is not None:
            self.changed += int((before != after).count_nonzero())
            self.answers += before.numel()

    def error(self) -> OutputError:
        relative = self.metric.numbers(self.norms)["relative_error"]
        return OutputError(
            relative_error=relative if math.isfinite(relative) else None,
            divergence=self.divergence / self.samples,
            changed=self.changed / self.answers if self.answers else None,
        )
