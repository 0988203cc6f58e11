"""LIQ with weight normalization: weights standardised first, then clipped at a learned bound; SAQ's quantizer for CNNs.

Paper     Liu, Cai, Zhuang: "Sharpness-aware Quantization for Deep Neural Networks", arXiv 2111.12273 (released code)
Idea      Standardised weights use every level whatever their spread, so one learned bound per layer is enough.
Computes  w_n = (w - mean) / std, a * (2 R_b((clip(w_n / a, -1, 1) + 1) / 2) - 1) -> LiqWeight
Departs   With `restore_scale` (default) the result is multiplied by std again, so that layers without a norm behind them keep
          their output range; the mean is not added back, as in the code: what it adds to the output
          varies with the image, and training has to make up for it. Activations are LSQ's, the same function
          under another parametrisation.
Costs     As LSQ, and two passes over the weights.
Measured  docs/results-flat-training: saq. ResNet-20 on CIFAR-10 at W2A2, a short schedule, one seed: 83.1 % top-1
          after plain training, 80.5 % with LSQ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitscape.quant.functional import MINIMUM_SCALE, at_least, power_of_two
from bitscape.quant.observers import Observer
from bitscape.quant.quantizers.base import WeightFakeQuantizer
from bitscape.quant.quantizers.lsq import LsqActivation


class LiqWeight(WeightFakeQuantizer):
    """Standardised weights on 2^b symmetric levels without zero; one learned `clip` per layer, in standard deviations."""

    def __init__(self, weight: Tensor, bits: int, restore_scale: bool) -> None:
        super().__init__(bits, signed=True, mid_rise=True)
        self.clip = nn.Parameter(torch.ones((), dtype=torch.float32, device=weight.device))
        self.restore_scale = restore_scale

    @property
    def scale(self) -> Tensor:
        """Float32 spacing of the grid, derived from the learned bound."""
        scale: Tensor = at_least(self.clip, MINIMUM_SCALE) * (2 / (2 ** int(self.bits) - 1))
        return scale

    def transform(self, weight: Tensor) -> Tensor:
        centered = weight - weight.detach().mean()
        return centered if self.restore_scale else centered / _deviation(weight)

    def _spacing(self, weight: Tensor) -> Tensor:
        return self.scale * _deviation(weight) if self.restore_scale else self.scale

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        normalized = (values - values.mean()) / _deviation(values)
        scale = observer.scale(normalized.reshape(1, -1), self.grid)[0]
        self.clip.copy_(scale * ((2 ** int(self.bits) - 1) / 2))


def _deviation(weight: Tensor) -> Tensor:
    """Standard deviation; that of equal weights is what their mean may be off by."""
    weight = weight.detach()
    low, high = weight.aminmax()
    largest = high.maximum(-low)
    unit = power_of_two(largest)  # squares of small weights are zero in float32
    deviation = (weight / unit).std(unbiased=False) * unit
    return deviation.maximum(largest * torch.finfo(weight.dtype).eps).clamp(min=MINIMUM_SCALE)


@dataclass(frozen=True, kw_only=True)
class Liq:
    """Weight-normalised quantization with a learned clip; scales per tensor."""

    restore_scale: bool = True
    """Multiply by the weight's standard deviation again; False as in SAQ's code (needs a norm after every layer)."""

    def for_weight(self, weight: Tensor, bits: int, channel_axis: int = 0) -> LiqWeight:
        """Fake-quantizer for a weight of any shape; one scale for all channels."""
        return LiqWeight(weight, bits, self.restore_scale)

    def for_activation(self, bits: int | Tensor) -> LsqActivation:
        """Fake-quantizer for a layer's input."""
        return LsqActivation(bits)
