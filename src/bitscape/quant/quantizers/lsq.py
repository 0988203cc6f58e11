"""LSQ: the scale is a parameter, learned by its own gradient.

Paper     Esser, McKinstry, Bablani, Appuswamy, Modha: "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153
Idea      The grid spacing is trained together with the weights. Its gradient sees how close each value lies to a transition
          between codes, and is scaled by 1 / sqrt(N * qmax) so that scales and weights move at a like pace.
Computes  Eq. 1-2 -> functional.fake_quantize; Eq. 3 and 5 -> its backward; section 2.2 -> lsq_gradient_factor
Departs   One scale per output channel for weights by default (paper: per layer), N then counts a channel. Scales start at the squared-error
          optimum instead of 2 mean|v| / sqrt(qmax). One-bit weights are the sign on a mid-rise grid. Grids of activations
          may begin between the signed and the unsigned one, our own choice: of all whole zero points that of the least
          squared error, where it leaves at most 3/4 of the signed grid's. Training keeps the zero point.
          Weights' scales may start coarser than the optimum (`coarseness`), our own choice: see docs/deploy.
Costs     Two passes over each tensor more than float training; see docs/results: speed.
Measured  docs/results: the default quantizer of every benchmark. Zero points, without training, repaired, one run, from a
          signed grid: text direction (MobileNetV3, 2,000 lines) 73.7 -> 83.4 % at W4A4 and 95.3 -> 95.9 % at W6A6 BitOps;
          YOLOX-nano (200 images, AP against the float boxes) 10.9 -> 21.7 % at W6A6 BitOps, 26.0 -> 30.8 % at 4-bit bytes and A8;
          CCT (2,000 images) 82.7 -> 83.7 % at W4A4 BitOps; MobileNetV2 (744 images) 57.5 -> 59.7 % at W4A4 BitOps.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.quant.functional import fake_quantize
from bitscape.quant.observers import Observer, activation_range
from bitscape.quant.quantizers.base import (
    FakeQuantizer,
    PerChannel,
    Sharing,
    WeightFakeQuantizer,
    grouped,
    scale_shape,
)


class LsqWeight(WeightFakeQuantizer):
    """Weights on a signed grid with learned scales."""

    def __init__(
        self, weight: Tensor, bits: int | Tensor, sharing: Sharing, channel_axis: int = 0, coarseness: float = 1.0
    ) -> None:
        super().__init__(bits, signed=True)
        self.coarseness = coarseness
        shape = scale_shape(weight.shape, sharing, channel_axis)
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=weight.device))
        self.gradient_factor = lsq_gradient_factor(weight.numel() // max(1, math.prod(shape)), self.grid.qmax)

    def transform(self, weight: Tensor) -> Tensor:
        return weight

    def _spacing(self, weight: Tensor) -> Tensor:
        return self.scale

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        scales = observer.scale(grouped(values, self.scale.shape), self.grid)
        self.scale.copy_(self.coarseness * scales.reshape(self.scale.shape))


class LsqActivation(FakeQuantizer):
    """Activations with one learned scale, on the grid that `activation_range` chooses."""

    def __init__(self, bits: int | Tensor, zero_points: bool = True) -> None:
        super().__init__(bits, signed=False)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))
        self.zero_points = zero_points

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        factor = lsq_gradient_factor(x.numel() // max(1, x.shape[0]), self.grid.qmax)
        return fake_quantize(x, self.scale, self.grid, scale_gradient_factor=factor)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        scale, levels = activation_range(values.flatten(), self.bits, observer, zero_points=self.zero_points)
        self.use(levels)
        self.scale.copy_(scale)


def lsq_gradient_factor(elements: int, qmax: float | Tensor) -> float:
    """1 / sqrt(N * qmax) of section 2.2; N elements share the scale. A 1-bit signed grid (qmax 0) counts as 1."""
    largest = float(qmax.max()) if isinstance(qmax, Tensor) else qmax
    return 1.0 / math.sqrt(max(1, elements) * max(1.0, largest))


@dataclass(frozen=True, kw_only=True)
class Lsq:
    """Learned step size quantization (default)."""

    weight_scales: Sharing = field(default_factory=PerChannel)
    """One scale per output channel, or one per tensor."""
    zero_points: bool = True
    """Whether grids of activations may begin between signed and unsigned ones; False for FINN, which takes no zero point."""
    coarseness: float = 1.0
    """Weights' scales start at so many times those of the least squared error, above 0. Above 1 codes lie nearer to zero
    than their width allows, and no weight is clipped: compilers that encode weights store such codes in fewer bits, at
    less error than codes of that many bits have. A file of fixed widths gains nothing."""

    def __post_init__(self) -> None:
        """Check `coarseness`."""
        if not (isinstance(self.coarseness, int | float) and 0 < self.coarseness < math.inf):
            raise BitscapeError(f"coarseness = {self.coarseness!r}: a number above 0; 1 is usual, 2 for encoded weights")

    def for_weight(self, weight: Tensor, bits: int | Tensor, channel_axis: int = 0) -> LsqWeight:
        """Fake-quantizer for a weight of any shape, its output channels along `channel_axis`."""
        return LsqWeight(weight, bits, self.weight_scales, channel_axis, self.coarseness)

    def for_activation(self, bits: int | Tensor) -> LsqActivation:
        """Fake-quantizer for a layer's input."""
        return LsqActivation(bits, self.zero_points)
