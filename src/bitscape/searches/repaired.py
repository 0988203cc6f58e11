"""The noise that repair leaves of a layer's quantization, for scores of the network that will run.

`bs.quantize` rounds weights such that their errors cancel in the layer's output, and then gives each
output channel the float network's mean. Scores of nearest rounding count noise that will not be
there, of weights above all: searches by them buy weight bits with activation bits.

Codes fit the images that they were chosen on, the more the fewer these are: changes are as large as
those of codes from half of the images on the other half.

The gain that repair restores too is left in: it grows with the noise squared.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.models.layers import channel_axis, quantizable_layers, weighted_layers
from bitscape.policy import LayerBits, Policy
from bitscape.progress import track
from bitscape.quant.convert import batches_of, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Lsq
from bitscape.quant.repair import (
    InputMoments,
    RoundingError,
    compensate_rounding,
    input_moments,
)
from bitscape.searches.sensitivity import RANGE_SAMPLES, LayerNoise, calls, candidate_widths, layer_noise

DEFAULT_QUANTIZER = Lsq()


def repaired_noise(
    model: nn.Module,
    names: list[str],
    samples: Samples,
    candidates: tuple[LayerBits, ...],
    batch_size: int = 16,
    quantizer: Lsq = DEFAULT_QUANTIZER,
) -> dict[str, LayerNoise]:
    """Return what `layer_noise` does, of repaired weights and without the shifts that repair takes back.

    Args:
        model: float network, eval mode, norms folded.
        samples: all count for the rounding, the first 64 for ranges and shifts.
        batch_size: samples at once whose layers' inputs and outputs are held.
        quantizer: of weights.
    """
    weights = _weight_changes(model, samples, candidate_widths(candidates)[0], quantizer)
    noise = layer_noise(model, names, samples, candidates, weights)
    shifts = _shifts(model, names, batches_of(samples.first(RANGE_SAMPLES), model, batch_size), noise)
    return {name: replace(of_layer, shifts=shifts.get(name)) for name, of_layer in noise.items()}


def _weight_changes(
    model: nn.Module, samples: Samples, widths: Sequence[int], quantizer: Lsq
) -> dict[str, dict[int, Tensor]]:
    """Layer -> bits -> Q(W) - W, in the size that it has for images that no code has seen."""
    moments = input_moments(model, samples)
    layers = weighted_layers(model)
    changes: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
    for bits in track(widths, label="rounding: width"):
        weights, errors = rounded_weights(model, moments, bits, quantizer)
        for name, weight in weights.items():
            change = weight - layers[name].get_parameter("weight").detach()
            changes[name][bits] = change * (unseen_growth(errors[name]) if name in errors else 1.0)
    return changes


def unseen_growth(error: RoundingError) -> float:
    """How much larger output changes are on images that the rounding has not seen, at least 1.

    Nearest rounding looks at no image.
    """
    fitted = 0 < error.repaired < error.nearest
    return math.sqrt(error.unseen / error.repaired) if fitted else 1.0


def rounded_weights(
    model: nn.Module,
    moments: Mapping[str, InputMoments],
    bits: int,
    quantizer: Lsq = DEFAULT_QUANTIZER,
) -> tuple[dict[str, Tensor], dict[str, RoundingError]]:
    """Name -> the weight that `bs.quantize` gives the layer at this width, of every layer with one; and what it errs by.

    Args:
        model: float network, norms folded.
        moments: its `input_moments`.
        quantizer: of weights.
    """
    floats = dict.fromkeys(quantizable_layers(model), LayerBits.FLOAT)
    rounded = dict.fromkeys(weighted_layers(model), LayerBits(bits, bits))
    network = with_quantizers(model, Policy({**floats, **rounded}), quantizer)
    errors = compensate_rounding(network, moments)
    layers = quantized_layers(network)
    return {name: layer.weight.detach() for name, layer in layers.items()}, errors


def _shifts(
    model: nn.Module, names: list[str], batches: Iterable[Inputs], noise: Mapping[str, LayerNoise]
) -> dict[str, Tensor]:
    """Mean of each layer's output changes in each channel, in their order, (changes, c).

    Layers without a bias, which takes the means back, are left out.
    """
    sums: dict[str, Tensor] = {}
    runs: dict[str, int] = {}
    biased = [name for name in names if noise[name].layer.bias is not None]
    for inputs in track(batches, label="shifts: batch"):
        for call in calls(model, biased, inputs):
            changes = itertools.chain(*noise[call.name].output_changes(call.input, call.second))
            axis = channel_axis(noise[call.name].layer, call.output)
            means = torch.stack([change.movedim(axis, 0).flatten(1).mean(1) for change in changes])
            sums[call.name] = sums.get(call.name, 0.0) + means * len(call.output)
            runs[call.name] = runs.get(call.name, 0) + len(call.output)
    return {name: total / runs[name] for name, total in sums.items()}
