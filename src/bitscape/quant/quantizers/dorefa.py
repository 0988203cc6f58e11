"""DoReFa: weights squashed by tanh onto symmetric levels, activations clipped to a fixed range.

Paper     Zhou, Wu, Ni, Zhou, Wen, Zou: "DoReFa-Net", 2016, arXiv 1606.06160
Idea      tanh bounds the weights, so that equal levels between -1 and 1 are used well without anything to learn.
Computes  Eq. 9 -> DorefaWeight.transform; Eq. 7 -> its 1-bit form; Eq. 11 -> ClippedActivation
Departs   With `restore_scale` (default) the levels are multiplied back to the weight's own range, so that layers without a norm
          behind them keep their output; the paper leaves them in -1..1. Activations are clipped at a calibrated bound (paper: 1),
          symmetric where they are signed.
Costs     Two more passes over the weights than LSQ (tanh).
Measured  docs/results-flat-training: saq. ResNet-20 on CIFAR-10 at W2A2, a short schedule, one seed: 72.1 % top-1
          after plain training, 80.5 % with LSQ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitscape.quant.functional import MINIMUM_SCALE, fake_quantize
from bitscape.quant.observers import Observer
from bitscape.quant.quantizers.base import FakeQuantizer, WeightFakeQuantizer


class DorefaWeight(WeightFakeQuantizer):
    """2 R_b(tanh(w) / (2 max|tanh w|) + 1/2) - 1; 1 bit: sign(w) mean|w|. Nothing is learned but the weight."""

    def __init__(self, bits: int, restore_scale: bool) -> None:
        super().__init__(bits, signed=True, mid_rise=True)
        self.restore_scale = restore_scale

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        y = super()._quantize_dequantize(x)
        # Eq. 7: the sign passes every gradient; the grid by itself would stop those beyond its two levels. x - x is exactly 0.
        return y.detach() + (x - x.detach()) if self.bits == 1 else y

    def transform(self, weight: Tensor) -> Tensor:
        if self.bits == 1:
            return weight
        squashed = weight.tanh()
        stretch: Tensor = self._reach(weight) / squashed.detach().abs().max().clamp(min=MINIMUM_SCALE)
        return squashed * stretch

    def _spacing(self, weight: Tensor) -> Tensor:
        if self.bits == 1:
            return 2 * weight.detach().abs().mean()
        spacing: Tensor = self._reach(weight) * (2 / (2 ** int(self.bits) - 1))
        return spacing

    def _reach(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        return weight.abs().max().clamp(min=MINIMUM_SCALE) if self.restore_scale else weight.new_ones(())

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        """Nothing to set: the range follows the weight."""


class ClippedActivation(FakeQuantizer):
    """A range fixed at calibration; gradient 1 inside, 0 outside."""

    scale: Tensor

    def __init__(self, bits: int | Tensor) -> None:
        super().__init__(bits, signed=False)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.grid)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        self.see_sign(values)
        self.scale.copy_(observer.scale(values.reshape(1, -1), self.grid)[0])


@dataclass(frozen=True, kw_only=True)
class Dorefa:
    """DoReFa-Net quantization; scales per tensor."""

    restore_scale: bool = True
    """Multiply the levels back to the weight's own range; False keeps -1..1 as in the paper (needs a norm after every layer)."""

    def for_weight(self, weight: Tensor, bits: int, channel_axis: int = 0) -> DorefaWeight:
        """Fake-quantizer for a weight of any shape; one scale for all channels."""
        return DorefaWeight(bits, self.restore_scale)

    def for_activation(self, bits: int | Tensor) -> ClippedActivation:
        """Fake-quantizer for a layer's input."""
        return ClippedActivation(bits)
