"""Output correction: the mean and the spread that quantization takes from each channel of a layer's output, given back.

Paper     Nagel, van Baalen, Blankevoort, Welling: "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
          arXiv 1906.04721
Idea      Rounding errors of weights and activations do not average to zero; each channel's output shifts, and later layers
          see the shift. Added here: outputs also shrink, a little in every layer, because a scale of least squared error
          makes the quantized weight shorter than the weight.
Computes  section 4.2, from images -> correct_biases; its Eq. 17 -> Correction.affine with gain 1
Departs   With `gain` (default) the channel's standard deviation is restored too, by its weight scale; without, a shrunken
          output around the right mean is worse than a shrunken output (figures below). One pass: each batch runs through
          the float network and then through the quantized one, in which a layer's output is corrected before it goes on,
          so that later layers see corrected inputs as in the paper's layer-by-layer form. Comparing the same images
          keeps the noise between images out.
          `repair` corrects a layer's output when the layer has been rounded.
Costs     One forward pass of either network over the images.
Measured  MobileNetV2 1.0 and SqueezeNet 1.1, uniform 4-bit weights (first and last layer 8), 8-bit activations, 128 images to
          repair, 200 to 300 others of an ImageNet sample to test, one run, standard error 3 points: after
          nearest rounding (0.3 and 42.7 % correct) 53.5 and 49.5 %, with biases alone 2.7 and 7.0 %; after compensated
          rounding (72.0 and 58.0 %) 80.0 and 58.5 %, with biases alone 65.0 and 56.7 %.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitscape.errors import BitscapeError, nearest
from bitscape.models.dtypes import check_float32
from bitscape.models.layers import output_channels, quantizable_layers
from bitscape.models.prepare import as_prepared
from bitscape.quant.chains import shared_parameters
from bitscape.quant.convert import Data
from bitscape.quant.layers import QuantizedLayer, has_channel_scales, quantized_layers
from bitscape.quant.quantizers.base import Codes
from bitscape.quant.quantizers.lsq import LsqWeight
from bitscape.quant.repair.channels import ChannelMoments, run_side_by_side, variance
from bitscape.quant.repair.norms import correcting_hooks

_log = logging.getLogger("bitscape.quant.repair")


def correct_biases(model: nn.Module, float_model: nn.Module, data: Data, *, gain: bool = True) -> dict[str, float]:
    """Give each channel of each layer's output the float network's mean, by its bias, and standard deviation, by its scale.

    In place. A layer without a bias stays as it is; `fold_norms` gives it one. Norms that are not
    folded do the same by their statistics. Layers with a gain end with weights that lie on their grid.

    Args:
        model: quantized and calibrated.
        float_model: the network that was quantized (its nn.MultiheadAttention split, if it has any).
        data: samples, a tensor (n, ...), or batches of inputs; normalized.
        gain: restore standard deviations too, where a layer has one LSQ weight scale per output channel; False corrects
            biases alone, as in the paper.

    Returns:
        Layer name -> root mean square of the shift of the channels' means, relative to their standard deviations.

    Raises:
        BitscapeError: no image, or a layer with a bias or a norm that the float network lacks.
    """
    float_model = as_prepared(float_model)
    layers = {name: one for name, one in quantized_layers(model).items() if one.bias is not None}
    partners = partners_of(layers, float_model)
    shared = shared_parameters(model)
    corrections = {
        name: Correction(layer, gain and layer.weight not in shared and has_channel_scales(layer))
        for name, layer in layers.items()
    }
    handles = [partners[name].register_forward_hook(c.see_float) for name, c in corrections.items()]
    handles += [layers[name].register_forward_hook(c.correct) for name, c in corrections.items()]
    handles += correcting_hooks(model, float_model)
    run_side_by_side(float_model, model, data, handles)
    shifts = {name: c.write() for name, c in corrections.items() if c.outputs.any_seen}
    if layers and not shifts:
        raise BitscapeError("images: no layer with a bias ran; pass at least one image")
    if shifts:
        log_shifts(shifts)
    return shifts


def partners_of(names: Iterable[str], float_model: nn.Module) -> dict[str, nn.Module]:
    """The layers `names` of `float_model`; raises BitscapeError where it lacks one."""
    check_float32(float_model, "float_model")
    layers = quantizable_layers(float_model)
    missing = [name for name in names if name not in layers]
    if missing:
        raise BitscapeError(
            f"float_model: it has no layer {missing[0]!r}{nearest(missing[0], layers)}; "
            "pass the network that was quantized"
        )
    return {name: layers[name] for name in names}


def log_shifts(shifts: Mapping[str, float]) -> None:
    """Log the mean shift of the layers."""
    mean = sum(shifts.values()) / len(shifts)
    _log.info("outputs of %d layers corrected: mean shift %.3g standard deviations", len(shifts), mean)


class Correction:
    """One layer's outputs in the float and the quantized network, averaged over the calls so far."""

    def __init__(self, layer: QuantizedLayer, gain: bool) -> None:
        self.layer, self.gain = layer, gain
        self.outputs = ChannelMoments(output_channels(layer), layer.weight.device)

    def see_float(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outputs.see_float(self._by_channel(output))

    def correct(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.see_quantized(output)
        return self.corrected(output)

    def see_quantized(self, output: Tensor) -> None:
        """Take an output whose float form has been seen."""
        self.outputs.see_quantized(self._by_channel(output))

    def corrected(self, output: Tensor) -> Tensor:
        """The output with the float mean and deviation of what was seen so far."""
        shape = [1] * output.ndim
        shape[self._axis(output)] = -1
        gain, shift = (v.to(output.dtype).reshape(shape) for v in self.affine())
        return torch.addcmul(shift, output, gain)

    def affine(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """The gain and shift that give the quantized channels the float mean and deviation."""
        expected, seen = self.outputs.expected[0], self.outputs.seen[0]
        gain = self.outputs.gain() if self.gain else torch.ones_like(seen)
        return gain, expected - gain * seen

    @torch.no_grad()
    def write(self) -> float:
        """Move gain and shift into the layer; return the relative size of the means' shift."""
        gain, shift = self.affine()
        bias = self.layer.get_parameter("bias")
        bias.copy_(bias * gain + shift)
        if self.gain:
            _multiply_rows(self.layer, gain)
        moved = (self.outputs.expected[0] - self.outputs.seen[0]).norm()
        return float(moved / variance(self.outputs.expected).sum().sqrt().clamp(min=torch.finfo(moved.dtype).tiny))

    def _by_channel(self, output: Tensor) -> Tensor:
        return output.movedim(self._axis(output), 1)

    def _axis(self, output: Tensor) -> int:
        return output.ndim - 1 if isinstance(self.layer, nn.Linear) else 1


def _multiply_rows(layer: QuantizedLayer, gain: Tensor) -> None:
    """Multiply the quantized weight's rows by `gain`: the codes stay, the scales take it."""
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, LsqWeight)
    codes = quantizer.codes(layer.weight)
    quantizer.scale.copy_(codes.scale * gain.reshape(codes.scale.shape))
    layer.weight.copy_(Codes(codes.q, quantizer.grid_scale(layer.weight), codes.zero_point).dequantize())
