"""The decision on one layer's bits: few parameters, a distribution over widths that can be sampled and differentiated."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_SPREAD = 0.1
"""Least deviation of a sampled width, in bits."""
LEAST_VARIATION = 1e-3
"""Of a feature over the calibration images, as a share of its largest value: what varies less keeps its own scale, as it may vary later."""
EDGE = 1e-3
"""Probabilities nearer to 0 and 1 than this are moved there, so that logits stay finite."""
START_SPREAD = -1.0
"""Before the softplus: 0.31 bits more than the least."""


class Standardizing(nn.Module):
    """What sees features by how they vary over the calibration images.

    Attributes:
        center, spread: buffers (features,); their mean, and their deviation or 1.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.center: Tensor
        self.spread: Tensor
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def standardize(self, features: Tensor) -> None:
        """Take center and spread from features (n, features) of calibration images."""
        self.center.copy_(features.mean(0))
        deviation = features.std(0, correction=0)
        self.spread.copy_(deviation.where(deviation > LEAST_VARIATION * features.abs().amax(0), 1.0))

    def standardized(self, features: Tensor) -> Tensor:
        """Return features (n, features) as distances from the center, in spreads."""
        return (features - self.center) / self.spread


class Head(Standardizing):
    """A linear decision on features: for each width the middle m and the deviation v of its distribution, in bits."""

    def __init__(self, features: int, decisions: int, start: float) -> None:
        super().__init__(features)
        self.linear = nn.Linear(features, 2 * decisions)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, START_SPREAD)
        self.begin_at(start)

    @torch.no_grad()
    def begin_at(self, width: float) -> None:
        """Let every decision be `width` where features are those of the mean image."""
        self.linear.bias[: self.linear.out_features // 2] = width

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and v, both (n, decisions), for features (n, features)."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 tells widths apart by 1/32 only
            m, r = self.linear(self.standardized(features.float())).chunk(2, dim=1)
        return m, functional.softplus(r) + LEAST_SPREAD


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Limit `x` to low..high; the gradient is kept where descent along it leads back inside.

    A sigmoid in its place has hardly a slope near its ends, where heads begin.
    """
    return cast(Tensor, _Bounded.apply(x, low, high))  # type: ignore[no-untyped-call]  # autograd.Function.apply is untyped


def gumbel(share: Tensor) -> Tensor:
    """Sample 0 or 1, the latter with probability `share`, relaxed to a number between them at temperature 1.

    The binary case of Jang, Gu, Poole: "Categorical reparameterization with Gumbel-softmax", ICLR 2017, arXiv 1611.01144, Eq. 2.
    """
    inside = share + (share.clamp(EDGE, 1 - EDGE) - share).detach()
    noise = torch.rand_like(share).clamp(EDGE, 1 - EDGE).logit()  # the difference of two Gumbel variables is logistic
    return (inside.logit() + noise).sigmoid()


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.limits
        outward = ((x > high) & (g < 0)) | ((x < low) & (g > 0))
        return g.masked_fill(outward, 0.0), None, None
