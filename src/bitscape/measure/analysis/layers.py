"""The noise of every layer's weight, input and output, on the float network's activations."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitscape.calling import call
from bitscape.data.samples import Samples
from bitscape.errors import explained_forward, prefixed
from bitscape.measure.analysis.tensors import NoiseMeter, TensorNoise, decibels, energy
from bitscape.measure.analysis.twins import Twins
from bitscape.models.layers import has_weight
from bitscape.models.modes import evaluating
from bitscape.progress import track
from bitscape.quant.convert import batches_of, operands_of
from bitscape.quant.reference import widened

_log = logging.getLogger("bitscape.measure")


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """What quantizing does to one layer's tensors, all other layers float."""

    weight: TensorNoise
    """Of the weight; of a product of two activations, of its second operand."""
    input: TensorNoise
    """Of the input; of a product of two activations, of its first operand."""
    output_db_by_weight: float | None
    """Of the layer's output with the weight alone quantized: signal to noise in dB; None without
    noise.
    """
    output_db_by_input: float | None
    """The same with the input alone quantized."""


def layer_noise(twins: Twins, samples: Samples, batch_size: int) -> dict[str, LayerNoise]:
    """Run the float twin once and return the noise of every layer that ran.

    Memory does not grow with the number of batches.

    Raises:
        BitscapeError: weights or inputs that are not finite; the layer is named.
    """
    meters = {name: _LayerMeter(twins, name) for name in twins.layers}
    total = sum(1 for _ in samples.batches(batch_size))
    batches = track(
        batches_of(samples, twins.twin, batch_size), label="analyze: noise, batch", total=total
    )
    with evaluating(twins.twin), evaluating(twins.network), _seen_by(meters, twins):
        for inputs in batches:
            with explained_forward(inputs):
                call(twins.twin, inputs)
    noise = {}
    for name, meter in meters.items():
        if meter.runs:
            with prefixed(f"layer {name}"):
                noise[name] = meter.result()
        else:
            _log.warning("layer %s never ran: it is left out of the analysis", name)
    return noise


class _LayerMeter:
    """Adds up all noise of one layer."""

    def __init__(self, twins: Twins, name: str) -> None:
        self.layer, self.runs = twins.layers[name], 0
        self.weight = NoiseMeter(self.layer.weight_quantizer)
        self.input = NoiseMeter(self.layer.input_quantizer)
        self.halves = [twins.half(name, "weight"), twins.half(name, "input")]
        self.signal, self.noises = 0.0, [0.0, 0.0]
        if has_weight(self.layer):
            exact = twins.exact[name].get_parameter("weight")
            self.weight.add(exact, self.layer.weight_quantizer(self.layer.weight))

    def add(self, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
        """Take in one run of the float layer."""
        first, *others = operands_of(inputs, named)
        self.input.add(first, self.layer.input_quantizer(first))
        if not has_weight(self.layer):
            self.weight.add(others[0], self.layer.weight_quantizer(others[0]))
        self.signal += energy(widened(output))
        changes = [widened(half(*inputs, **named)) - widened(output) for half in self.halves]
        self.noises = [noise + energy(d) for noise, d in zip(self.noises, changes, strict=True)]
        self.runs += 1

    def result(self) -> LayerNoise:
        by_weight, by_input = (decibels(self.signal, noise) for noise in self.noises)
        return LayerNoise(
            weight=self.weight.result(),
            input=self.input.result(),
            output_db_by_weight=by_weight,
            output_db_by_input=by_input,
        )


@contextmanager
def _seen_by(meters: Mapping[str, _LayerMeter], twins: Twins) -> Iterator[None]:
    """Within the block the meters take in every run of the float twin's layers."""

    def hook_for(meter: _LayerMeter) -> Callable[..., None]:
        def hook(
            _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> None:
            meter.add(inputs, named, output)

        return hook

    handles = [
        twins.exact[name].register_forward_hook(hook_for(meter), with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
