"""LSQ+: LSQ with a learned offset for activations, for networks whose activations reach a little below zero.

Paper     Bhalgat, Lee, Nagel, Blankevoort, Kwak: "LSQ+: Improving low-bit quantization through learnable offsets and better
          initialization", CVPR Workshops 2020, arXiv 2004.09576
Idea      SiLU, GELU and hard-swish have a short negative tail: a signed grid wastes half its codes on it, an unsigned one cuts it off. An
          unsigned grid that may start anywhere holds both. Zero need not lie on it: files move the offset to the nearest code.
Computes  Eq. 3-6 -> LsqPlusActivation; section 3.2 -> least_squares_range
Departs   Weights start where the observer puts them, as LSQ's do. The paper's start, max|mean +- 3 std| / 2^(b-1), is meant for
          training: it cuts off the outliers that a trained network needs before it is trained again.
Costs     As LSQ, one more pass over the activations.
Measured  docs/results-flat-training: saq. ResNet-20 on CIFAR-10 at W2A2, a short schedule, one seed: 79.4 % top-1
          after plain training, 80.5 % with LSQ.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitscape.quant.functional import MINIMUM_SCALE, at_least, fake_quantize, power_of_two, scale_gradient
from bitscape.quant.grid import Grid
from bitscape.quant.observers import Observer
from bitscape.quant.quantizers.base import FakeQuantizer, PerChannel, Sharing
from bitscape.quant.quantizers.lsq import LsqWeight, lsq_gradient_factor
from bitscape.quant.reference import quantize


class LsqPlusActivation(FakeQuantizer):
    """scale * q + offset with q on an unsigned grid; scale and offset learned."""

    def __init__(self, bits: int | Tensor) -> None:
        super().__init__(bits, signed=False)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        factor = lsq_gradient_factor(x.numel() // max(1, x.shape[0]), self.grid.qmax)
        scale = scale_gradient(at_least(self.scale, MINIMUM_SCALE), factor)
        grid = Grid(self.grid.qmin, self.grid.qmax, -scale_gradient(self.offset, factor) / scale)
        return fake_quantize(x, scale, grid)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        scale, offset = least_squares_range(values.reshape(-1), self.grid, observer)
        self.scale.copy_(scale)
        self.offset.copy_(offset)


def least_squares_range(values: Tensor, grid: Grid, observer: Observer, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and offset of the smallest squared error that is met on the way from the observer's range.

    The way alternates offset = mean(v - s q) and s = <v - offset, q> / <q, q> (Eq. 6, least squares form), which may also lead astray.
    """
    unit = power_of_two(values.abs().max())  # errors are squared, and those of small values must not vanish
    values = values / unit
    offset = values.min().clamp(max=0)
    scale = observer.scale((values - offset)[None], grid)[0]
    met = []
    for _ in range(steps):
        q = quantize(values - offset, scale, grid)
        met.append((float((offset + scale * q - values).square().mean()), scale, offset))
        offset = (values - scale * q).mean()
        scale = ((values - offset) @ q / (q @ q).clamp(min=1e-12)).clamp(min=MINIMUM_SCALE)
    _, scale, offset = min(met, key=lambda step: step[0])
    return scale * unit, offset * unit


@dataclass(frozen=True, kw_only=True)
class LsqPlus:
    """LSQ with learned activation offsets, for training; `Lsq` has zero points that stay as they are calibrated."""

    weight_scales: Sharing = field(default_factory=PerChannel)
    """One scale per output channel, or one per tensor."""

    def for_weight(self, weight: Tensor, bits: int | Tensor, channel_axis: int = 0) -> LsqWeight:
        """Fake-quantizer for a weight of any shape, its output channels along `channel_axis`."""
        return LsqWeight(weight, bits, self.weight_scales, channel_axis)

    def for_activation(self, bits: int | Tensor) -> LsqPlusActivation:
        """Fake-quantizer for a layer's input."""
        return LsqPlusActivation(bits)
