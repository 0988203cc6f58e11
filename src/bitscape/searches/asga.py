"""Asga: the mixture search on a flat loss surface, with aligned gradients and an adaptive radius.

Paper     Ma, Ma, Zhou, Xie, He, Lu: "Learning from loss landscape: generalizable mixed-precision quantization via adaptive sharpness-aware
          gradient aligning", ICML 2025, arXiv 2505.04877; Wang et al.: "Sharpness-aware gradient matching for domain generalization"
          (SAGM), CVPR 2023, arXiv 2303.10353, for the alignment
Idea      The sharper the loss of the quantized proxy network, the worse its bits suit another data set. So the search lowers the loss, the
          loss at a perturbed point and their gap together, and draws the two gradients into one direction.
Computes  t_p = t + (rho / ||g|| - a) g -> sharpness.Ascent; gradient (g + g_p) / 2 -> AsgaStep; h = L(t_p) - L(t), rho = ln(1 + h)
          -> Radius
Departs   No code was released; the alignment is SAGM's, inferred. The radius follows a running mean of the gap within fixed limits: by the
          bare rule it decays to zero, saturates or turns negative. Perturbed are the weights after the quantizer and the norms' parameters,
          not latent weights (`perturb="latent"` is the ablation), logits or scales. Cost does not depend on weights and is left out.
Costs     two forward and backward passes a step: about twice Differentiable.
Measured  docs/results-searches: transfer-policies, asga-ladder.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bitscape.engine import Batch, Step, StepRecord
from bitscape.engine.workers import mean
from bitscape.errors import BitscapeError
from bitscape.searches.mixed_network import Mixed
from bitscape.searches.mixture_search import MixtureSettings
from bitscape.searches.proxy_task import ProxyTask
from bitscape.sharpness import Ball, random_state, repeating

Gradients = list[tuple[nn.Parameter, Tensor]]
MEMORY = 0.9
"""Share of the running mean of the gap that is kept at each step."""


@dataclass(kw_only=True)
class Radius:
    """How far the perturbed point lies: `start` throughout, or by the gap within limits."""

    adaptive: bool
    start: float
    low: float
    high: float
    gap: float = field(init=False)
    """Running mean of the surrogate gap."""

    def __post_init__(self) -> None:
        self.gap = math.expm1(self.start)

    def rho(self) -> float:
        """The radius of the next step."""
        return min(max(math.log1p(max(self.gap, 0.0)), self.low), self.high) if self.adaptive else self.start

    def see(self, gap: float) -> None:
        """Take in the gap of a step."""
        self.gap = MEMORY * self.gap + (1 - MEMORY) * gap


@dataclass(kw_only=True)
class AsgaStep:
    """Two passes over one batch: at the weights, and at the perturbed ones."""

    mixed: Mixed = field(repr=False)
    ball: Ball
    radius: Radius
    alignment: float
    descent: Literal["mean", "perturbed"]

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient in `.grad`: the mean of both passes, or that of the second."""
        self.mixed.keep_budget()
        state = random_state(model)
        with self.ball.watched(model) as ascent:
            record = batch.backward(model)
        first = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        rho = self.radius.rho()
        with repeating(model, state), ascent.applied(ascent.factor(rho) - self.alignment):
            gap = batch.backward(model).loss - record.loss
        self.radius.see(float(mean(gap)))
        extras = {"rho": torch.tensor(rho), "gap": gap, "ascent_norm": ascent.norm, "cosine": _cosine(first)}
        if self.descent == "mean":
            _average(first)
        return replace(record, extras=extras)

    def state_dict(self) -> dict[str, Tensor]:
        """The running mean of the gap."""
        return {"gap": torch.tensor(self.radius.gap, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.radius.gap = float(state["gap"])


def _average(first: Gradients) -> None:
    """Make `.grad` the mean of itself and the first pass's gradient."""
    for parameter, gradient in first:
        parameter.grad = gradient.mul_(0.5) if parameter.grad is None else parameter.grad.add_(gradient).mul_(0.5)


def _cosine(first: Gradients) -> Tensor:
    """Cosine between the gradients of the two passes, over all trained parameters."""
    pairs = [(before, parameter.grad) for parameter, before in first if parameter.grad is not None]
    product = torch.stack([(before * after).sum() for before, after in pairs]).sum()
    lengths = (torch.nn.utils.get_total_norm(list(each)) for each in zip(*pairs, strict=True))
    return product / math.prod(lengths, start=torch.tensor(1.0, device=product.device)).clamp(min=1e-20)


@dataclass(frozen=True, kw_only=True)
class Asga(MixtureSettings):
    """Settings of the mixture search with sharpness-aware, aligned steps."""

    radius: Literal["adaptive", "fixed"] = "adaptive"
    """Whether the radius follows the gap."""
    rho: float = 0.05
    """Radius, in the units of the weights; where an adaptive one starts."""
    rho_min: float = 0.01
    """Least adaptive radius."""
    rho_max: float = 0.2
    """Largest adaptive radius."""
    alignment: float = 0.001
    """Share of the gradient taken off the move, which rewards gradients that agree; 0: none."""
    descent: Literal["mean", "perturbed"] = "mean"
    """Descend along the mean of both gradients, or along the perturbed one alone (SAM)."""
    perturb: Literal["quantized", "latent"] = "quantized"
    """Move the weights after their quantizer, or before it."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if not 0 < self.rho_min <= self.rho <= self.rho_max < math.inf:
            raise BitscapeError(f"rho = {self.rho}: it must lie between rho_min = {self.rho_min} and rho_max = {self.rho_max}, all above 0")
        if not 0 <= self.alignment < math.inf:
            raise BitscapeError(f"alignment = {self.alignment}: it must be at least 0; 0.001 is usual")

    def make_step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """Two passes a batch."""
        radius = Radius(adaptive=self.radius == "adaptive", start=self.rho, low=self.rho_min, high=self.rho_max)
        return AsgaStep(mixed=mixed, ball=Ball(weights=self.perturb), radius=radius, alignment=self.alignment, descent=self.descent)
