"""PACT: activations clipped at a learned bound; weights as in DoReFa.

Paper     Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan: "PACT: Parameterized Clipping Activation", 2018, arXiv 1805.06085
Idea      ReLU has no upper bound, so a quantizer needs one: let training find it, and let L2 pull it down.
Computes  Eq. 1-3 -> PactActivation
Departs   The bound starts at the calibrated range (paper: 6 to 10). Signed inputs (images, linear bottlenecks) are clipped to -clip..clip.
          The L2 term enters as a gradient, so that no loss has to know of it.
Costs     As DoReFa.
Measured  docs/results-flat-training: saq. ResNet-20 on CIFAR-10 at W2A2, a short schedule, one seed: 72.2 % top-1
          after plain training, 80.5 % with LSQ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.quant.functional import MINIMUM_SCALE
from bitscape.quant.grid import Number
from bitscape.quant.observers import Observer
from bitscape.quant.quantizers.base import FakeQuantizer
from bitscape.quant.quantizers.dorefa import DorefaWeight
from bitscape.quant.reference import dequantize, quantize, widened


class PactActivation(FakeQuantizer):
    """clip(x, 0, clip) on an unsigned grid; the gradient of `clip` is 1 where x >= clip (Eq. 3)."""

    def __init__(self, bits: int | Tensor, decay: float) -> None:
        super().__init__(bits, signed=False)
        self.clip = nn.Parameter(torch.ones((), dtype=torch.float32))
        self.decay = decay

    @property
    def scale(self) -> Tensor:
        """Float32 spacing of the grid, derived from the learned bound."""
        return (self.clip.detach() / self._reach).clamp(min=MINIMUM_SCALE)

    @property
    def _reach(self) -> Number:
        """The grid's upper end in scales; 1/2 for the signs of one bit."""
        return self.grid.qmax - self.grid.zero_point

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        clip = _WithL2.apply(self.clip, self.decay)  # type: ignore[no-untyped-call]  # autograd.Function.apply is untyped
        clipped = torch.clamp(widened(x), -clip if self.signed else torch.zeros_like(clip), clip)
        with torch.no_grad():
            on_grid = dequantize(quantize(clipped, self.scale, self.grid), self.scale, self.grid.zero_point)
        return (clipped + (on_grid - clipped).detach()).to(x.dtype)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        self.see_sign(values)
        self.clip.copy_(observer.scale(values.reshape(1, -1), self.grid)[0] * self._reach)


class _WithL2(torch.autograd.Function):
    """The value itself; its gradient gains decay * value, that of an L2 penalty decay / 2 * value^2."""

    @staticmethod
    def forward(ctx: Any, clip: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(clip)
        ctx.decay = decay
        return clip.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (clip,) = ctx.saved_tensors
        return g + ctx.decay * clip, None


@dataclass(frozen=True, kw_only=True)
class Pact:
    """Learned clipping of activations, DoReFa weights."""

    decay: float = 1e-4
    """L2 pull on the clipping bound, at least 0."""
    restore_scale: bool = True
    """As in `Dorefa`."""

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise BitscapeError(f"decay = {self.decay}: the L2 pull on the clip is at least 0; 1e-4 is usual")

    def for_weight(self, weight: Tensor, bits: int, channel_axis: int = 0) -> DorefaWeight:
        """Fake-quantizer for a weight of any shape; one scale for all channels."""
        return DorefaWeight(bits, self.restore_scale)

    def for_activation(self, bits: int | Tensor) -> PactActivation:
        """Fake-quantizer for a layer's input."""
        return PactActivation(bits, self.decay)
