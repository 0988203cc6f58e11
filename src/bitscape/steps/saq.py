"""Saq: sharpness-aware quantized training; the quantized weights are what moves to the point of highest loss.

Paper     Liu, Cai, Zhuang: "Sharpness-aware quantization for deep neural networks", arXiv 2111.12273.
Idea      Quantization noise and the perturbation of sharpness-aware training hinder each other: perturbing the latent weight hardly
          changes a code. So training lowers the loss at Q(w) + e, where e follows the gradient in Q(w) itself (case 3).
Computes  e = rho g_q / ||g_q||, g_q = dL/dQ(w), one norm over all layers -> sharpness.Ascent; dL/d(Q(w) + e), straight through to w
          -> SharpStep of sam.py
Departs   rho is a share of the length of the ball's members: the paper's 0.3 to 0.9 belong to weights of unit variance. Its efficient form
          is not public; `interval` and `reuse` are ours, from LookSAM (see sam.py). `adaptive` is the ASAM form.
Costs     as Sam: two forward and backward passes a step, uncompiled and in float32; with `interval` k one more pass every k-th step.
Measured  docs/results-flat-training: saq. ResNet-20, short schedules: 0.6 points over plain training at 3 bits and more after
          equal epochs, level with it after equal time; nothing at 2 bits.
"""

from dataclasses import dataclass

from bitscape.errors import BitscapeError
from bitscape.sharpness.ball import MovedWeights
from bitscape.steps.sam import SharpSettings

WEIGHTS: dict[int, MovedWeights] = {1: "independent", 2: "latent", 3: "quantized"}
"""Case of the paper -> what the ball holds of a layer's weight."""


@dataclass(frozen=True, kw_only=True)
class Saq(SharpSettings):
    """Settings of the sharpness-aware step on quantized weights."""

    case: int = 3
    """Of the paper: 1 moves Q(w) along the gradient of w; 2 moves w, as Sam does; 3 moves Q(w) along its own gradient."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.case not in WEIGHTS:
            raise BitscapeError(f"case = {self.case}: 1, 2 or 3; 3 is the method")

    @property
    def weights(self) -> MovedWeights:
        """What the case says that the ball holds of a layer's weight."""
        return WEIGHTS[self.case]
