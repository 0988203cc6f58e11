"""What the sensitivity scores share: candidate ranges calibrated once, a layer's output change under each, the table of scores, the result.

A layer's output is linear in its input and in its weight, so that for a pair (weight bits, activation bits)

    Y(pair) - Y = dY_w + dY_a + cross,   dY_w = layer(X, Q(W) - W),   dY_a = layer(Q(X) - X, W),   cross = layer(Q(X) - X, Q(W) - W)

and R_w + R_a runs of the layer give all R_w * R_a pairs up to the cross term, which is of second order.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitscape import calling
from bitscape.calling import Inputs, moved
from bitscape.cost.layers import NetworkProfile
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.forward import device_of
from bitscape.engine.task import Task, tracked
from bitscape.errors import BitscapeError, explained_backward
from bitscape.models.layers import channel_axis, has_weight, quantizable_layers, scale_axis
from bitscape.models.modes import evaluating
from bitscape.policy import LayerBits, fingerprint
from bitscape.progress import track
from bitscape.quant.convert import batches_of, operands_of, record_inputs, second_input
from bitscape.quant.functional import fake_quantize
from bitscape.quant.grid import Grid, grid
from bitscape.quant.layers import apply_layer
from bitscape.quant.observers import Mse, activation_range
from bitscape.quant.quantizers.base import PerChannel, grouped, scale_shape
from bitscape.quant.reference import widened
from bitscape.searches.choices import Choices
from bitscape.searches.gain import gain_of
from bitscape.searches.pick import check_pick, chosen
from bitscape.searches.problem import Pick, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable

RANGE_SAMPLES = 64
"""Of which input ranges are taken."""

Range = tuple[Tensor, Grid]
"""Scale and grid of a tensor."""


PASS_BYTES = 1 << 29
"""Held by one pass: its graph, about GRAPH_COPIES of the layers' outputs, and their gradients of every draw."""


GRAPH_COPIES = 4
"""Of the layers' outputs, in float32."""


PART_ELEMENTS = 1 << 18
"""Of a layer's input or output, for each core of a CPU, for which the changes are made together."""


def images_a_pass(network: NetworkProfile, draws: int) -> int:
    """How many images go through the network together, at least one, for a pass to keep within PASS_BYTES."""
    of_image = 4 * (GRAPH_COPIES + draws) * sum(layer.output_elements for layer in network.layers)
    return max(1, PASS_BYTES // of_image)


def _noise(x: Tensor, scale: Tensor, levels: Grid) -> Tensor:
    return fake_quantize(x, scale, levels).sub_(x)


@dataclass(frozen=True)
class LayerNoise:
    """One layer's quantization noise under every candidate width."""

    layer: nn.Module
    weights: Mapping[int, Tensor]
    """weight bits -> Q(W) - W; empty for a product of two activations."""
    ranges: Mapping[int, "Range"]
    """activation bits -> scale and grid of the layer's input."""
    second: Mapping[int, "Range"] = field(default_factory=dict)
    """Of a product of two activations: weight bits -> scale and grid of the second."""
    shifts: Tensor | None = None
    """What repair takes back of each output channel, (R_w + R_a, c), in the order of `output_changes`."""

    def of_input(self, x: Tensor, bits: int) -> Tensor:
        """Q(X) - X, in float32."""
        return _noise(widened(x), *self.ranges[bits])

    @torch.no_grad()
    def output_changes(self, x: Tensor, second: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """dY_w for each weight width and dY_a for each activation width, in the order of the two mappings.

        Of a product of two activations `second` is the other one, and stands in the place of the weight.
        """
        if second is not None:
            by_weight = [torch.matmul(widened(x), _noise(widened(second), *levels)) for levels in self.second.values()]
            return by_weight, [torch.matmul(self.of_input(x, bits), widened(second)) for bits in self.ranges]
        weight = self.layer.get_parameter("weight")
        by_weight = [apply_layer(self.layer, x, noise) for noise in self.weights.values()]
        by_input = [apply_layer(self.layer, self.of_input(x, bits), weight) for bits in self.ranges]
        if self.shifts is not None:
            for change, shift in zip([*by_weight, *by_input], self.shifts, strict=True):
                change.movedim(channel_axis(self.layer, change), -1).sub_(shift)
        return by_weight, by_input


def tracked_batches(samples: Samples, model: nn.Module, batch_size: int, *, label: str) -> Iterator[Minibatch]:
    """Batches on the model's device, with progress in the log."""
    device = device_of(model)
    targets = [moved(batch.targets, device) for batch in samples.batches(batch_size)]
    batches = map(Minibatch, batches_of(samples, model, batch_size), targets)
    return track(batches, label=label, total=len(targets))


def call_with_gradients(model: nn.Module, inputs: Inputs) -> Any:
    """Call the network such that gradients reach layers behind frozen ones."""
    return calling.call(model, tracked(inputs))


def candidate_widths(candidates: tuple[LayerBits, ...]) -> tuple[list[int], list[int]]:
    """The different weight bits and activation bits among the candidates, ascending."""
    return sorted({c.weight for c in candidates}), sorted({c.activation for c in candidates})


@torch.no_grad()
def layer_noise(
    model: nn.Module,
    names: list[str],
    samples: Samples,
    candidates: tuple[LayerBits, ...],
    weights: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> dict[str, LayerNoise]:
    """Calibrate every candidate width of the named layers once: squared-error scales, per channel for weights, per tensor for inputs.

    Args:
        model: float network, eval mode.
        samples: the first 64 are used for the input ranges.
        weights: layer -> weight bits -> Q(W) - W; None rounds to nearest.
    """
    weight_bits, activation_bits = candidate_widths(candidates)
    layers = {name: layer for name, layer in quantizable_layers(model).items() if name in set(names)}
    inputs = record_inputs(model, layers, batches_of(samples.first(RANGE_SAMPLES), model))
    noise = {}
    for name, layer in layers.items():
        ranges = _ranges(inputs[name], activation_bits)
        if has_weight(layer):
            of_weight = {bits: _weight_noise(layer, bits) for bits in weight_bits} if weights is None else weights[name]
            noise[name] = LayerNoise(layer, of_weight, ranges)
        else:
            noise[name] = LayerNoise(layer, {}, ranges, _ranges(inputs[second_input(name)], weight_bits))
    return noise


def _ranges(values: Tensor, widths: Sequence[int]) -> dict[int, Range]:
    return {bits: activation_range(values, bits, Mse()) for bits in widths}


def _weight_noise(layer: nn.Module, bits: int) -> Tensor:
    weight, levels = layer.get_parameter("weight"), grid(bits, signed=True)
    shape = scale_shape(weight.shape, PerChannel(), scale_axis(layer))
    scale = Mse().scale(grouped(weight, shape), levels).reshape(shape)
    return _noise(weight, scale, levels)


@dataclass(frozen=True)
class _Run:
    """One run of one layer on one batch."""

    name: str
    input: Tensor
    second: Tensor | None = field(default=None, kw_only=True)
    """Second operand of a product of two activations."""


@dataclass(frozen=True)
class LayerCall(_Run):
    """What came in and what went out; `calls` gives both in float32, also under autocast."""

    output: Tensor


def calls(model: nn.Module, names: list[str], inputs: Inputs) -> Iterator[LayerCall]:
    """Run `inputs` without a graph and yield every run of the named layers."""
    with evaluating(model), recorded(model, names) as seen:
        calling.call(model, inputs)
    for call in seen:
        yield LayerCall(call.name, widened(call.input), widened(call.output), second=call.second)


@dataclass(frozen=True)
class GradedCall(_Run):
    """What came in, and the gradients of the drawn losses at what went out, in float32."""

    gradients: tuple[Tensor, ...]
    """One of each draw."""

    def parts(self, layer: nn.Module) -> "Iterator[GradedCall]":
        """On a CPU the run in parts of few images, so that the changes of one part stay in the cache; else all of it.

        All of it, too, where the first dimension may count something else than images.
        """
        tensors = [self.input, *self.gradients, *([] if self.second is None else [self.second])]
        unbatched = layer.get_parameter("weight").ndim - 1 if self.second is None else 2
        (ndim, images), *others = {(tensor.ndim, len(tensor)) for tensor in tensors}
        if others or ndim <= unbatched or self.input.device.type != "cpu":
            yield self
            return
        elements = PART_ELEMENTS * torch.get_num_threads()
        together = max(1, elements * images // max(tensor.numel() for tensor in tensors))
        for of_part in zip(*(tensor.split(together) for tensor in tensors), strict=True):
            x, gradients, second = of_part[0], of_part[1 : 1 + len(self.gradients)], of_part[1 + len(self.gradients) :]
            yield GradedCall(self.name, x, gradients, second=second[0] if second else None)


def visit_gradients(
    model: nn.Module,
    names: list[str],
    batch: Minibatch,
    task: Task,
    generator: torch.Generator,
    visit: Callable[[GradedCall], None],
    draws: int = 1,
) -> None:
    """Run the batch, and `visit` every run of the named layers as soon as the last backward pass has its gradient.

    The gradients are those of the task's drawn losses, summed over images: in expectation their mean squares are the
    true Fisher information. Only a user's own loss looks at targets. What was kept of a run goes when it was visited.
    Runs on which the loss does not depend are left out.
    """
    start = torch.zeros((), requires_grad=True)  # every output depends on it: the backward pass ends there
    losses: tuple[Tensor, ...] = ()

    def see(call: LayerCall) -> Tensor:
        require_gradient(call.name, call.output)
        gradients: list[Tensor] = []

        def add(gradient: Tensor, x: Tensor, second: Tensor | None) -> None:
            gradients.append(widened(gradient))
            if len(gradients) == len(losses):
                visit(GradedCall(call.name, widened(x), tuple(gradients), second=second))
                gradients.clear()

        return _Visited.apply(call.output, start, call.input.detach(), call.second, add)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function.apply is untyped

    with evaluating(model), torch.enable_grad(), seeing(model, names, see), explained_backward():
        values = task.outputs(call_with_gradients(model, batch.inputs), len(batch))
        losses = task.drawn_losses(values, generator, batch.targets, draws).sum(1).unbind()
        for loss in losses:
            torch.autograd.grad(loss, start, allow_unused=True, retain_graph=loss is not losses[-1])
    losses = ()  # `add`, which the graph holds, holds them: nothing would ever let go of the graph


class _Visited(torch.autograd.Function):
    """A layer's output, with which the network goes on; each backward pass adds its gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, start: Tensor, x: Tensor, second: Tensor | None, add: Callable[[Tensor, Tensor, Tensor | None], None]
    ) -> Tensor:
        ctx.save_for_backward(x, second)
        ctx.add = add
        return output.clone()  # an in-place activation behind the layer may not write into what the layer returned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, second = ctx.saved_tensors
        ctx.add(gradient, x, second)
        return gradient, None, None, None, None


def require_gradient(layer: str, output: Tensor) -> None:
    """Raise BitscapeError where the network lets no gradient through to the layer's output."""
    if torch.is_inference_mode_enabled():
        raise BitscapeError(
            "torch.inference_mode is on, and this method needs gradients; call it outside, or use method kl or local"
        )
    if not output.requires_grad:
        raise BitscapeError(
            f"layer {layer}: no gradient reaches it, because the network runs it without (torch.no_grad, detach); "
            "use method kl or local, which need none"
        )


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[list[LayerCall]]:
    """Within the block every run of the named layers is added to the list."""
    seen: list[LayerCall] = []

    def see(call: LayerCall) -> Tensor:
        seen.append(call)
        return call.output.clone()  # an in-place activation behind the layer would overwrite what was recorded

    with seeing(model, names, see):
        yield seen


@contextmanager
def seeing(model: nn.Module, names: list[str], see: Callable[[LayerCall], Tensor]) -> Iterator[None]:
    """Within the block `see` gets every run of the named layers, and returns with what output the network goes on."""

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            operands = operands_of(inputs, named)
            second = None if has_weight(layer) else operands[1].detach()
            return see(LayerCall(name, operands[0], output, second=second))

        return hook

    wanted = set(names)
    layers = {name: layer for name, layer in quantizable_layers(model).items() if name in wanted}
    handles = [layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def score_table(
    method: str,
    choices: Choices,
    by_layer: Mapping[str, NDArray[np.float64]],
) -> ScoreTable:
    """Make the table from each layer's scores (R_w, R_a) of width pairs, repaired to fall with either width; repairs are counted."""
    candidates = choices.candidates
    weight_bits, activation_bits = candidate_widths(candidates)
    at = [(weight_bits.index(c.weight), activation_bits.index(c.activation)) for c in candidates]
    raw = np.array([[scores[pair] for pair in at] for scores in by_layer.values()]).reshape(len(by_layer), len(at))
    values = monotone(raw, candidates)
    repairs = int((~np.isclose(values, raw, rtol=1e-6, atol=0)).sum())
    return ScoreTable(tuple(by_layer), candidates, values, method, repairs, fingerprint(choices.network.shapes))


def monotone(values: NDArray[np.float64], candidates: Sequence[LayerBits]) -> NDArray[np.float64]:
    """Scores (L, R) that never rise with more bits: the mean of the smallest such table above `values` and the largest below.

    It equals `values` where these are monotone already, and approximates isotonic regression where sampling noise made them not.
    """
    larger = np.array([[d.weight >= c.weight and d.activation >= c.activation for d in candidates] for c in candidates])
    above: NDArray[np.float64] = np.where(larger[None], values[:, None, :], -np.inf).max(2)
    below: NDArray[np.float64] = np.where(larger.T[None], values[:, None, :], np.inf).min(2)
    return (above + below) / 2


class Scoring(Protocol):
    """A method that scores."""

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone; any budget is then one integer programme away."""
        ...


Trace = tuple[Mapping[str, Any], ...]


def search_by_scores(problem: SearchProblem, method: Scoring, pick: Pick) -> SearchResult:
    """Score every free layer and candidate with `method`, then allocate bits exactly within the problem's budget."""
    return finish(problem, method, lambda: (method.score(problem), ()), pick)


def finish(
    problem: SearchProblem, method: Any, scored: Callable[[], tuple[ScoreTable, Trace]], pick: Pick, **about: Any
) -> SearchResult:
    """Run `scored`, then choose the policy within the budget by `pick`; say where it comes from, and what else is known `about` it."""
    check_pick(pick, problem.samples)
    started, choices = time.perf_counter(), problem.choices
    provenance = {**problem.provenance(method), "pick": pick, **about}
    if not problem.free_layers:
        policy = replace(choices.only_policy(), provenance=provenance)
        return SearchResult(policy, None, (), time.perf_counter() - started, choices)
    scores, trace = scored()
    policy, probed = chosen(problem, scores, pick)
    gain = gain_of(scores, choices)
    known = {} if gain is None else {"gain": gain.bits}
    policy = replace(policy, provenance={**policy.provenance, **provenance, "repairs": scores.repairs, **known})
    return SearchResult(policy, scores, (*trace, *probed), time.perf_counter() - started, choices, gain)
