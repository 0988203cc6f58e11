"""HAWQ: the mean curvature of the loss at a layer's weights and inputs, times the squared quantization error.

Paper     Dong et al.: "HAWQ-V2", NeurIPS 2020, arXiv 1911.03852 (weights and activations); Yao et al.: "HAWQ-V3", ICML 2021,
          arXiv 2011.10680
Idea      A layer in a flat region tolerates coarse values. The trace of the Hessian, estimated by random probes, measures how flat.
Computes  trace(H) / n * ||Q(W) - W||^2, and the same for the input -> `hutchinson_traces`, `pair_scores`
Departs   Labels are drawn from the network's softmax, as for fisher, so that no labels are needed.
Costs     About 5 forward passes over the images for each probe; a second-order graph in memory.
Measured  docs/results: ptq-imagenet, qat-cifar10.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitscape.models.layers import quantizable_layers
from bitscape.quant.convert import evaluating
from bitscape.search.problem import ScoreTable, SearchProblem, SearchResult
from bitscape.search.sensitivity import LayerNoise, Recorder, at_least_one, drawn_labels, layer_noise, score_table, solve, tracked_batches


def hutchinson_traces(loss: Tensor, variables: list[Tensor], probes: int, generator: torch.Generator) -> list[float]:
    """Trace of the Hessian of `loss` in each variable by itself: mean over Rademacher probes v of <v, Hv>."""
    gradients = torch.autograd.grad(loss, variables, create_graph=True)
    totals = [0.0] * len(variables)
    for _ in range(probes):
        signs = [torch.randint(0, 2, v.shape, generator=generator).to(v) * 2 - 1 for v in variables]
        products = torch.autograd.grad(gradients, variables, signs, retain_graph=True)
        totals = [total + float((sign * product).sum()) for total, sign, product in zip(totals, signs, products, strict=True)]
    return [total / probes for total in totals]


def pair_scores(noise: LayerNoise, x: Tensor, weight_curvature: float, input_curvature: float) -> NDArray[np.float64]:
    """Scores (R_w, R_a); curvatures are trace / n. `x` is a sample of the layer's input, errors of which are summed for one image."""
    by_weight = [weight_curvature * float(change.square().sum()) for change in noise.weights.values()]
    by_input = [input_curvature * float(noise.of_input(x, bits).square().sum()) / len(x) for bits in noise.ranges]
    return np.add.outer(by_weight, by_input)


@dataclass(frozen=True, kw_only=True)
class Hawq:
    """Hessian trace times squared error (paper baseline)."""

    images: int = 64
    """Proxy images, at least 1."""
    batch_size: int = 16
    """Images a pass; the second-order graph needs about three times the memory of training."""
    probes: int = 8
    """Random probes a batch."""

    def __post_init__(self) -> None:
        at_least_one(images=self.images, batch_size=self.batch_size, probes=self.probes)

    def search(self, problem: SearchProblem) -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget."""
        started = time.perf_counter()
        return solve(problem, self.score(problem), self, started)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone."""
        model, names, images = problem.prepared, list(problem.free_layers), problem.images[: self.images]
        noise = layer_noise(model, names, images, problem.candidates)
        generator = torch.Generator().manual_seed(problem.seed)
        scores: dict[str, NDArray[np.float64]] = {}
        for batch in tracked_batches(images, model, self.batch_size, label="hawq: batch"):
            for name, table in self._batch_scores(model, names, batch, noise, generator).items():
                scores[name] = scores.get(name, 0.0) + table * (len(batch) / len(images))
        return score_table("hawq", problem.candidates, scores)

    def _batch_scores(
        self, model: nn.Module, names: list[str], batch: Tensor, noise: dict[str, LayerNoise], generator: torch.Generator
    ) -> dict[str, NDArray[np.float64]]:
        layers = quantizable_layers(model)
        # Fused attention has no second derivative.
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Recorder(model, names) as recorder:
            logits = model(batch.detach().requires_grad_()).float()
        inputs = {name: x for name, x, _ in recorder.seen}
        loss = nn.functional.cross_entropy(logits, drawn_labels(logits, generator))
        weights = [layers[name].get_parameter("weight") for name in names]
        traces = hutchinson_traces(loss, [*weights, *(inputs[name] for name in names)], self.probes, generator)
        tables = {}
        for at, name in enumerate(names):
            x = inputs[name].detach()
            # The mean loss has 1 / n of an image's Hessian in that image's input: the trace over the batch is the mean image's.
            per_element = traces[len(names) + at] / x[0].numel()
            tables[name] = pair_scores(noise[name], x, traces[at] / weights[at].numel(), per_element)
        return tables
