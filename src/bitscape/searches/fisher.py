"""Fisher: the layer's output error, weighted by the squared gradient of the loss.

Paper     Theis, Korshunova, Tejani, Huszar: "Faster gaze prediction with dense networks and Fisher pruning", 2018,
          arXiv 1801.05787, for the score of a perturbed output; Choi, El-Khamy, Lee: "Towards the limit of network
          quantization", ICLR 2017, for bits
Idea      To second order the loss rises by the Fisher information times the squared output change. Labels are drawn from the network's own
          softmax, which is the true Fisher and needs no labels, so that any images can be the proxy. Other outputs have the
          loss of their task: answers of yes or no are drawn, and any other values are summed with random signs (Gauss-Newton).
Computes  S(layer, pair) = mean over images of sum_i G_i^2 dY_i^2 -> `pair_scores`; with `variant="directional"`, (sum_i G_i dY_i)^2
Departs   dY of a pair is dY_w + dY_a: the cross term is dropped, which makes R_w + R_a runs of a layer enough for R_w * R_a pairs.
          For a network that will be trained (`for_training`) only a tenth of the weight noise counts: dY = sqrt(0.1) dY_w + dY_a.
          Training moves weights to their grid but cannot give back what coarse activations lost; scores of the float network
          overrate weight bits. The tenth is ours, chosen on ResNet-20/CIFAR-10 among 1, 0.1 and 0.01 at one budget and one seed.
Costs     3 + R_w + R_a forward passes over the images.
Measured  docs/results. Without training: above uniform and kl on MobileNetV2, no difference on SqueezeNet. After training, ResNet-20:
          level with uniform at the BitOps of W4A4 and W3A3, ahead at 2.5 bits by an interval that still touches zero.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.quant.functional import is_dense
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import (
    GradedCall,
    LayerNoise,
    at_least_one,
    calls_with_gradients,
    candidate_widths,
    finish,
    layer_noise,
    score_table,
    tracked_batches,
)

Variant = Literal["elementwise", "directional"]


def pair_scores(call: GradedCall, noise: LayerNoise, variant: Variant, weight_share: float) -> Tensor:
    """Scores (R_w, R_a) of one layer on one batch, summed over its images; `weight_share` multiplies the squared weight noise."""
    by_weight, by_input = noise.output_changes(call.input, call.second)
    count = len(by_weight)
    weighted = _weighted([*by_weight, *by_input], call.gradient)
    root = math.sqrt(weight_share)
    if variant == "directional":
        along = weighted.sum(2)
        per_image: Tensor = (root * along[:count, None] + along[None, count:]).square()
        return per_image.sum(2)
    flat = weighted.flatten(1)
    products = flat @ flat.T
    squares = products.diagonal()
    return weight_share * squares[:count, None] + squares[None, count:] + 2 * root * products[:count, count:]


def _weighted(changes: list[Tensor], gradient: Tensor) -> Tensor:
    """G dY of every candidate: (R, n, elements of an image), the elements of all in one order."""
    first, batch = changes[0], len(gradient)
    together = gradient.new_empty(len(changes), batch, gradient[0].numel())
    for row, change in zip(together, changes, strict=True):
        # Written once, in the layout of the first change: a stack of flattened products would copy these large tensors twice.
        target = row.as_strided(change.shape, first.stride()) if is_dense(first) else row.view(change.shape)
        torch.mul(gradient, change, out=target)
    return together


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Fisher-weighted output error (default search)."""

    images: int = 256
    """Proxy images scored, at least 1."""
    batch_size: int = 16
    """Images a pass; memory grows with it."""
    weight_share_for_training: float = 0.1
    """Share of the squared weight noise that counts when `search` is told `for_training`, from 0 to 1."""
    variant: Variant = "elementwise"
    """Square each element's loss change, or the sum of them for an image."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick", "for_training"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images, batch_size=self.batch_size)
        if not 0.0 <= self.weight_share_for_training <= 1.0:
            raise BitscapeError(f"weight_share_for_training = {self.weight_share_for_training}: a share from 0 to 1; 0.1 is usual")

    def search(self, problem: SearchProblem, *, pick: Pick = "best", for_training: bool = False) -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget.

        `for_training` says that the quantized network will be trained afterwards.
        """
        scored = lambda: (self.score(problem, for_training=for_training), ())  # noqa: E731
        return finish(problem, self, scored, pick, for_training=for_training)

    def score(self, problem: SearchProblem, *, for_training: bool = False) -> ScoreTable:
        """The table of scores alone; any budget is then one integer programme away."""
        model, names = problem.prepared, list(problem.free_layers)
        samples = problem.samples.first(self.images)
        noise = layer_noise(model, names, samples, problem.choices.candidates)
        generator = torch.Generator().manual_seed(problem.seed)
        weight_bits, activation_bits = candidate_widths(problem.choices.candidates)
        weight_share = self.weight_share_for_training if for_training else 1.0
        totals = {name: np.zeros((len(weight_bits), len(activation_bits))) for name in names}
        for batch in tracked_batches(samples, model, self.batch_size, label="fisher: batch"):
            for call in calls_with_gradients(model, names, batch, problem.meaning, generator):
                totals[call.name] += pair_scores(call, noise[call.name], self.variant, weight_share).double().cpu().numpy()
        means = {name: total / len(samples) for name, total in totals.items()}
        return score_table("fisher", problem.choices, means)
