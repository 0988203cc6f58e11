"""LSQ+: LSQ with a learned offset for activations, for networks whose activations reach a little below zero.

Paper     Bhalgat, Lee, Nagel, Blankevoort, Kwak: "LSQ+: Improving low-bit quantization through learnable offsets and better
          initialization", CVPR Workshops 2020, arXiv 2004.09576
Idea      SiLU, GELU and hard-swish have a short negative tail: a signed grid wastes half its codes on it, an unsigned one cuts it off. An
          unsigned grid that may start anywhere holds both.
Computes  Eq. 3-6 -> LsqPlusActivation; section 3.2 -> least_squares_range and weight_scale
Departs   Weights start at max|mean +- 3 std| / 2^(b-1) per channel (paper: per tensor) whatever the observer is;
          at 1 bit, where that rule overshoots, at the observer's scale.
Costs     As LSQ, one more pass over the activations.
Measured  not yet
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitscape.quant.functional import fake_quantize, quantize, scale_gradient
from bitscape.quant.grid import Grid
from bitscape.quant.observers import MINIMUM_SCALE, Observer
from bitscape.quant.quantizers.base import FakeQuantizer, PerChannel, Sharing, grouped
from bitscape.quant.quantizers.lsq import LsqWeight, lsq_gradient_factor


class LsqPlusWeight(LsqWeight):
    """LSQ weights that start from mean and standard deviation."""

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        if isinstance(self.bits, int) and self.bits == 1:
            super()._set_range(values, observer)
            return
        rows = grouped(values, self.scale.shape)
        levels = self.grid.qmax - self.grid.qmin + 1
        self.scale.copy_(weight_scale(rows, levels).reshape(self.scale.shape))


def weight_scale(rows: Tensor, levels: float | Tensor) -> Tensor:
    """max|mean +- 3 std| / 2^(b-1) of each row (section 3.2)."""
    mean, deviation = rows.mean(1), rows.std(1, unbiased=False)
    reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return (2 * reach / levels).clamp(min=MINIMUM_SCALE)


class LsqPlusActivation(FakeQuantizer):
    """scale * q + offset with q on an unsigned grid; scale and offset learned."""

    def __init__(self, bits: int | Tensor) -> None:
        super().__init__(bits, signed=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        factor = lsq_gradient_factor(x.numel() // max(1, x.shape[0]), self.grid.qmax)
        scale = scale_gradient(self.scale.clamp(min=MINIMUM_SCALE), factor)
        grid = Grid(self.grid.qmin, self.grid.qmax, -scale_gradient(self.offset, factor) / scale)
        return fake_quantize(x, scale, grid)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        scale, offset = least_squares_range(values.reshape(-1), self.grid, observer)
        self.scale.copy_(scale)
        self.offset.copy_(offset)


def least_squares_range(values: Tensor, grid: Grid, observer: Observer, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Alternate offset = mean(v - s q) and s = <v - offset, q> / <q, q> from the observer's range (Eq. 6, least squares form)."""
    offset = values.min()
    scale = observer.scale((values - offset)[None], grid)[0]
    for _ in range(steps):
        q = quantize(values - offset, scale, grid)
        offset = (values - scale * q).mean()
        scale = ((values - offset) @ q / (q @ q).clamp(min=1e-12)).clamp(min=MINIMUM_SCALE)
    return scale, offset


@dataclass(frozen=True, kw_only=True)
class LsqPlus:
    """LSQ with learned activation offsets: take it for SiLU, GELU and hard-swish networks."""

    weight_scales: Sharing = field(default_factory=PerChannel)
    """One scale per output channel, or one per tensor."""

    def for_weight(self, weight: Tensor, bits: int | Tensor) -> LsqPlusWeight:
        """Fake-quantizer for a weight of any shape, output channels first."""
        return LsqPlusWeight(weight, bits, self.weight_scales)

    def for_activation(self, bits: int | Tensor) -> LsqPlusActivation:
        """Fake-quantizer for a layer's input."""
        return LsqPlusActivation(bits)
