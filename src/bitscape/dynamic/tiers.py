"""A few static networks and a tiny gate in place of a dynamic one: each runs in an ordinary runtime.

tiers = distill_tiers(network, images, count=3)
tiers(images); tiers.spent.bitops                 # (n,)
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional

from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.decision import Decision
from bitscape.dynamic.heads import Standardizing
from bitscape.dynamic.network import FEATURE_BITS, DynamicNetwork, decide
from bitscape.dynamic.quality import IMAGE_FEATURES, IMAGE_PASSES, image_features
from bitscape.dynamic.widths import Widths, at_widths
from bitscape.engine.spending import Spent
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

_log = logging.getLogger("bitscape.dynamic")
MOST_TIERS = 4
STARTS = 10
"""Of k-means; the best is taken."""
ROUNDING = 1e-9
"""Relative; sums of BitOps in another order differ by less."""
DECAY = 1e-3
"""Of the gate's squared weights, in the mean loss of the fit: keeps them finite where tiers part exactly."""


class Gate(Standardizing):
    """A linear choice among tiers by three cheap statistics of the image."""

    def __init__(self, tiers: int) -> None:
        super().__init__(len(IMAGE_FEATURES))
        self.linear = nn.Linear(len(IMAGE_FEATURES), tiers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tier (n,) of normalized images (n, c, h, w), counted from 0."""
        return self._scores(image_features(images)).argmax(1)

    def fit(self, images: Tensor, tiers: Tensor) -> None:
        """Learn to tell the `tiers` (n,) of images: multinomial logistic regression."""
        features = image_features(images)
        self.standardize(features)
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=100, line_search_fn="strong_wolfe")
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = functional.cross_entropy(self._scores(features), tiers) + DECAY * self.linear.weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.requires_grad_(False)

    def _scores(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.linear(self.standardized(features)))


class TieredNetwork(nn.Module):
    """Sends each image of a batch to one of a few static networks.

    Attributes:
        networks: ordinary quantized networks, cheapest first.
        policies: their bits.
        cost: what the layers do for one image.
        tiers: (n,), of the last batch.
    """

    def __init__(self, networks: Sequence[nn.Module], policies: Sequence[Policy], gate: Gate, cost: NetworkProfile) -> None:
        super().__init__()
        self.networks, self.policies, self.gate, self.cost = nn.ModuleList(networks), tuple(policies), gate, cost
        costs = [policy_cost(cost, policy) for policy in policies]
        work = IMAGE_PASSES * float(np.prod(cost.input_shape)) + gate.linear.weight.numel()
        self.gate_bitops = work * FEATURE_BITS**2
        self.tiers = torch.zeros(0, dtype=torch.long)
        self._bits: Tensor
        self._bitops: Tensor
        self.register_buffer("_bits", torch.tensor([each["mean_activation_bits"] for each in costs]), persistent=False)
        self.register_buffer("_bitops", torch.tensor([float(each["bitops"]) for each in costs]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (n, c, h, w)."""
        self.tiers = self.gate(images)
        return at_widths(images, Widths(self.tiers), lambda tier, own: cast(Tensor, self.networks[tier](own)))

    @property
    def spent(self) -> Spent:
        """Bits and BitOps of each image of the last batch, the gate's own included."""
        return Spent(bits=self._bits[self.tiers], bitops=self._bitops[self.tiers] + self.gate_bitops, tiers=self.tiers)


@torch.no_grad()
def distill_tiers(network: DynamicNetwork, images: Tensor, count: int = 3) -> TieredNetwork:
    """Return `count` static networks that stand for what the dynamic one decides, and the gate among them.

    Decisions are grouped by k-means, in BitOps; each group's mean, rounded, is a tier. Widths that were rounded up furthest are lowered
    until the tiers cost no more than the dynamic network on `images`.

    Args:
        network: trained; its weights are copied.
        images: normalized float32 (n, c, h, w), some thousand of the qualities to be met.
        count: 2 to 4; fewer tiers come back, with a warning, where decisions or images do not differ that much.

    Raises:
        BitscapeError: count out of range.
    """
    if not 2 <= count <= MOST_TIERS:
        raise BitscapeError(f"count = {count}: give 2 to {MOST_TIERS} tiers")
    decision, images = decide(network, images), images.to(network.shift.device)
    groups = _grouped(network, decision, count)
    gate, routed = _routed(images, groups)
    while len(routed.unique()) < len(groups.unique()):
        _log.warning(
            "the gate sends no image to %d of %d tiers: left out", len(groups.unique()) - len(routed.unique()), len(groups.unique())
        )
        groups = torch.searchsorted(routed.unique(), routed)
        gate, routed = _routed(images, groups)
    tiers = _rounded_within(
        network, _means(decision, groups), routed, float(decision.bitops(network.cost).double().mean()) * (1 + ROUNDING)
    )
    policies = [network.policy(tiers[slice(at, at + 1)]) for at in range(len(tiers))]
    return TieredNetwork([network.static(policy) for policy in policies], policies, gate, network.cost).to(images.device).eval()


def _routed(images: Tensor, groups: Tensor) -> tuple[Gate, Tensor]:
    """A gate that was fitted to the groups, and where it sends each image."""
    gate = Gate(len(groups.unique())).to(images.device)
    gate.fit(images, groups)
    return gate, torch.cat([gate(batch) for batch in images.split(512)])


def _grouped(network: DynamicNetwork, decision: Decision, count: int) -> Tensor:
    """Group (n,) of each decision, the cheapest group first."""
    macs = torch.tensor([float(layer.macs) for layer in network.cost.layers], device=decision.weight.device)
    rows = ((decision.weight * decision.activation) * macs / macs.sum()).double()
    distinct = len(rows.unique(dim=0))
    if distinct < count:
        _log.warning("decisions take only %d forms: so many tiers are made, not %d", distinct, count)
        count = distinct
    groups = torch.from_numpy(_best_kmeans(rows.cpu().numpy(), count)).long().to(rows.device)
    kept = groups.unique()
    costs = torch.stack([rows[groups == group].sum(1).mean() for group in kept])
    rank = torch.empty(count, dtype=torch.long, device=rows.device)
    rank[kept[costs.argsort()]] = torch.arange(len(kept), device=rows.device)
    return rank[groups]


def _best_kmeans(rows: Any, count: int) -> Any:
    """Labels of the rows; one start may end in a bad optimum."""
    runs = [kmeans2(rows, count, minit="++", seed=start) for start in range(STARTS)]
    return min(runs, key=lambda run: float(((rows - run[0][run[1]]) ** 2).sum()))[1]


def _means(decision: Decision, groups: Tensor) -> Decision:
    parts = [decision[groups == group] for group in groups.unique()]
    return Decision(torch.stack([part.weight.mean(0) for part in parts]), torch.stack([part.activation.mean(0) for part in parts]))


def _rounded_within(network: DynamicNetwork, means: Decision, routed: Tensor, limit: float) -> Decision:
    """Whole widths near `means` (tiers, layers) whose mean BitOps, tiers counted as images are `routed`, are at most `limit`."""
    shares = torch.bincount(routed, minlength=len(means)).double() / len(routed)
    dynamic = torch.tensor([layer.name in network.names for layer in network.cost.layers], device=routed.device)
    aims = torch.stack([means.activation, means.weight])
    widths = aims.round()
    free = dynamic & torch.tensor([True, network.bits.weights], device=routed.device)[:, None, None]
    while float(Decision(widths[1], widths[0]).bitops(network.cost).double() @ shares) > limit:
        lowered = (widths - aims).masked_fill(~free | (widths <= network.bits.low), -np.inf)
        if bool(lowered.isneginf().all()):
            break
        widths.view(-1)[lowered.argmax()] -= 1
    return Decision(widths[1], widths[0])


def shares_of(tiers: Sequence[Tensor], count: int) -> list[float]:
    """Return the share of the images, given by batches of their tiers, of each of `count` tiers."""
    chosen = torch.cat(list(tiers))
    shares: list[float] = (chosen.bincount(minlength=count).double() / len(chosen)).tolist()
    return shares
