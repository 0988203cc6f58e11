"""HAWQ: the mean curvature of the loss at a layer's weights and inputs, times the squared quantization error.

Paper     Dong et al.: "HAWQ-V2", NeurIPS 2020, arXiv 1911.03852 (weights and activations); Yao et al.: "HAWQ-V3", ICML 2021,
          arXiv 2011.10680
Idea      A layer in a flat region tolerates coarse values. The trace of the Hessian, estimated by random probes, measures how flat.
Computes  trace(H) / n * ||Q(W) - W||^2, and the same for the input -> `hutchinson_traces`, `weight_scores`,
          `input_scores`
Departs   Labels are drawn from the network's softmax, as for fisher, so that no labels are needed. A probe moves all weights and
          inputs at once (the paper: one layer's): unbiased and L times cheaper, but the other layers' blocks add variance, which
          shows as repairs of the scores.
Costs     About 5 forward passes over the images for each probe; a second-order graph in memory.
Measured  docs/transfer: transfer-scores. Rank correlation of predicted and measured loss, without training: 0.30 to 0.69 on ResNet-20,
          depending on the images, and 0.79 to 0.81 on MobileNetV2.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitscape.data.samples import Minibatch
from bitscape.errors import at_least_one, explained_backward
from bitscape.models.layers import quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.models.products import refuse_products
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import (
    LayerNoise,
    call_with_gradients,
    layer_noise,
    recorded,
    require_gradient,
    score_table,
    search_by_scores,
    tracked_batches,
)


@explained_backward()
def hutchinson_traces(loss: Tensor, variables: list[Tensor], probes: int, generator: torch.Generator) -> list[float]:
    """Trace of the Hessian of `loss` in each variable by itself: mean over Rademacher probes v of <v, Hv>."""
    gradients = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True) if variables else ()
    bent = [at for at, g in enumerate(gradients) if g is not None and g.requires_grad]  # the loss is flat in the others
    totals = [0.0] * len(variables)
    for _ in range(probes if bent else 0):
        signs = [torch.randint(0, 2, variables[at].shape, generator=generator).to(variables[at]) * 2 - 1 for at in bent]
        chosen = [gradients[at] for at in bent], [variables[at] for at in bent]
        products = torch.autograd.grad(*chosen, signs, retain_graph=True, allow_unused=True)
        for at, sign, product in zip(bent, signs, products, strict=True):
            totals[at] += 0.0 if product is None else float((sign * product).sum()) / probes
    return totals


def weight_scores(noise: LayerNoise, curvature: float) -> list[float]:
    """Scores (R_w) of a layer's weight: trace / n * ||Q(W) - W||^2."""
    return [curvature * float(change.square().sum()) for change in noise.weights.values()]


def input_scores(noise: LayerNoise, x: Tensor, curvature: float) -> NDArray[np.float64]:
    """Scores (R_a) of a layer's input: trace / n * ||Q(X) - X||^2, the squared error of the mean image of `x`."""
    return np.array([curvature * float(noise.of_input(x, bits).square().sum()) / len(x) for bits in noise.ranges])


@dataclass(frozen=True, kw_only=True)
class Hawq:
    """Hessian trace times squared error (paper baseline)."""

    images: int = 64
    """Proxy images, at least 1."""
    batch_size: int = 16
    """Images a pass; the second-order graph needs about three times the memory of training."""
    probes: int = 8
    """Random probes a batch."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images, batch_size=self.batch_size, probes=self.probes)

    def search(self, problem: SearchProblem, *, pick: Pick = "best") -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget."""
        return search_by_scores(problem, self, pick)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone."""
        refuse_products(problem.prepared, "method hawq")
        samples = problem.samples.first(self.images)
        noise = layer_noise(problem.prepared, list(problem.free_layers), samples, problem.choices.candidates)
        generator = torch.Generator().manual_seed(problem.seed)
        scores: dict[str, NDArray[np.float64]] = {}
        for batch in tracked_batches(samples, problem.prepared, self.batch_size, label="hawq: batch"):
            for name, table in self._batch_scores(problem, batch, noise, generator).items():
                scores[name] = scores.get(name, 0.0) + table * (len(batch) / len(samples))
        return score_table("hawq", problem.choices, scores)

    def _batch_scores(
        self, problem: SearchProblem, batch: Minibatch, noise: dict[str, LayerNoise], generator: torch.Generator
    ) -> dict[str, NDArray[np.float64]]:
        model, names = problem.prepared, list(problem.free_layers)
        layers, task = quantizable_layers(model), problem.meaning
        # Fused attention has no second derivative.
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), recorded(model, names) as seen:
            values = task.outputs(call_with_gradients(model, batch.inputs), len(batch))
            loss = task.curved_loss(values, generator, batch.targets).mean()
        for call in seen:
            require_gradient(call.name, call.output)
        weights = [layers[name].get_parameter("weight") for name in names]
        traces = hutchinson_traces(loss, [*weights, *(call.input for call in seen)], self.probes, generator)
        by_weight = {n: weight_scores(noise[n], t / w.numel()) for n, w, t in zip(names, weights, traces, strict=False)}
        by_input = {name: np.zeros(len(noise[name].ranges)) for name in names}
        for call, trace in zip(seen, traces[len(names) :], strict=True):
            # The mean loss has 1 / n of an image's Hessian in that image's input: the trace over the batch is the mean image's.
            by_input[call.name] += input_scores(noise[call.name], call.input.detach(), trace / call.input[0].numel())
        return {name: np.add.outer(by_weight[name], by_input[name]) for name in names}
