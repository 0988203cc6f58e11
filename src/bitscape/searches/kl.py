"""KL: how far the network's output distribution moves when one layer is quantized and all others stay float.

Paper     the per-layer sensitivity of common toolkits (for instance AIMET's and ModelOpt's); the separation below is ours
Idea      Quantize one layer at a time and compare the outputs with the float network's; no model of the loss is needed. Outputs
          other than class scores are compared by the divergence of their task.
Computes  S(layer, pair) = KL(float || weight at b_w) + KL(float || input at b_a), mean over images -> `Classes.divergence`
Departs   Weight and activation are quantized one after the other, not as pairs: R_w + R_a networks a layer instead of R_w * R_a.
Costs     1 + L (R_w + R_a) forward passes over the images, hence the smaller default of images.
Measured  docs/results: ptq-imagenet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bitscape.engine.following import outputs_on
from bitscape.errors import at_least_one
from bitscape.models.modes import evaluating
from bitscape.models.products import refuse_products
from bitscape.progress import track
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import LayerNoise, layer_noise, score_table, search_by_scores


@contextmanager
def _weight_at(noise: LayerNoise, bits: int) -> Iterator[None]:
    weight = noise.layer.get_parameter("weight")
    original = weight.detach().clone()
    try:
        weight.data.add_(noise.weights[bits])
        yield
    finally:
        weight.data.copy_(original)


@contextmanager
def _input_at(noise: LayerNoise, bits: int) -> Iterator[None]:
    def quantized(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        x, *others = inputs or (named["input"],)
        return (x + noise.of_input(x, bits), *others), {name: value for name, value in named.items() if name != "input"}

    handle = noise.layer.register_forward_pre_hook(quantized, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class Kl:
    """KL divergence of the logits, one layer quantized at a time (control)."""

    images: int = 64
    """Proxy images scored, at least 1."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images)

    def search(self, problem: SearchProblem, *, pick: Pick = "best") -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget."""
        return search_by_scores(problem, self, pick)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone."""
        refuse_products(problem.prepared, "method kl")
        model, samples = problem.prepared, problem.samples.first(self.images)
        noise = layer_noise(model, list(problem.free_layers), samples, problem.choices.candidates)
        task = problem.meaning

        def moved() -> float:
            outputs = outputs_on(model, samples, task)
            return float(torch.cat(list(map(task.divergence, outputs, reference))).mean())

        with evaluating(model):
            reference = outputs_on(model, samples, task)
            scores = {}
            for name in track(problem.free_layers, label="kl: layer"):
                by_weight, by_input = [], []
                for bits in noise[name].weights:
                    with _weight_at(noise[name], bits):
                        by_weight.append(moved())
                for bits in noise[name].ranges:
                    with _input_at(noise[name], bits):
                        by_input.append(moved())
                scores[name] = np.add.outer(by_weight, by_input)
        return score_table("kl", problem.choices, scores)
