"""Bias correction: the mean that quantization adds to a layer's output, taken out of the layer's bias.

Paper     Nagel, van Baalen, Blankevoort, Welling: "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
          arXiv 1906.04721
Idea      Rounding errors of weights and activations do not average to zero; each channel's output shifts, and later layers
          see the shift.
Computes  section 4.2, from images -> correct_biases
Departs   One pass: each batch runs through the float network and then through the quantized one, in which a layer's output
          is corrected before it goes on, so that later layers see corrected inputs as in the paper's layer-by-layer form.
          Comparing the same images keeps the noise between images out.
Costs     One forward pass of either network over the images.
Measured  not yet
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError, nearest
from bitscape.models.layers import quantizable_layers
from bitscape.quant.convert import batches_of, evaluating
from bitscape.quant.layers import quantized_layers

_log = logging.getLogger("bitscape.quant.repair")


def correct_biases(model: nn.Module, float_model: nn.Module, images: Tensor | Iterable[Tensor]) -> dict[str, float]:
    """Add to each layer's bias the mean of float minus quantized output, channel by channel, in place.

    A layer without a bias stays without: where a norm follows, `recalibrate_norms` does the same, and `fold_norms` gives it a bias.

    Args:
        model: quantized and calibrated; changed in place.
        float_model: the network that was quantized (its nn.MultiheadAttention split, if it has any).
        images: normalized float32 (n, c, h, w), or batches of them.

    Returns:
        Layer name -> root mean square of the correction over channels, relative to that of the float output's means.

    Raises:
        BitscapeError: no image, or a layer with a bias that the float network lacks.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.bias is not None}
    partners = quantizable_layers(float_model)
    missing = [name for name in layers if name not in partners]
    if missing:
        hint = nearest(missing[0], partners)
        raise BitscapeError(f"float_model: it has no layer {missing[0]!r}{hint}; pass the network that was quantized")
    corrections = {name: _Correction(layer) for name, layer in layers.items()}
    handles = [partners[name].register_forward_hook(c.see_float) for name, c in corrections.items()]
    handles += [layers[name].register_forward_hook(c.correct) for name, c in corrections.items()]
    try:
        with evaluating(model), evaluating(float_model):
            for batch in batches_of(images, model):
                float_model(batch)
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: c.write() for name, c in corrections.items() if c.weight}
    if not sizes:
        raise BitscapeError("images: no layer with a bias ran; pass at least one image, and fold norms first where biases are missing")
    _log.info("bias correction of %d layers: mean relative shift %.3g", len(sizes), sum(sizes.values()) / len(sizes))
    return sizes


class _Correction:
    """One layer's shift, averaged over the calls so far."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.waiting: list[Tensor] = []
        self.weight = 0
        self.shift = torch.zeros(())
        self.float_mean = torch.zeros(())

    def see_float(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.waiting.append(self._means(output))

    def correct(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        expected = self.waiting.pop(0)
        share = len(output) / (self.weight + len(output))
        self.shift = self.shift.to(expected) * (1 - share) + (expected - self._means(output)) * share
        self.float_mean = self.float_mean.to(expected) * (1 - share) + expected * share
        self.weight += len(output)
        shape = [1] * output.ndim
        shape[self.axis] = -1
        return output + self.shift.reshape(shape)

    def write(self) -> float:
        bias = self.layer.get_parameter("bias")
        with torch.no_grad():
            bias.add_(self.shift)
        return float(self.shift.norm() / self.float_mean.norm().clamp(min=1e-12))

    def _means(self, output: Tensor) -> Tensor:
        axis = self.axis % output.ndim
        return output.float().mean([i for i in range(output.ndim) if i != axis])
