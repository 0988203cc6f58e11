"""Local: the relative output error of one layer, without labels or gradients; the plain error ranking that any method must beat.

Paper     the layer-wise error of common toolkits; the confidence margin is ours
Idea      A layer whose output hardly changes when it takes few bits can have few bits. Nothing is said of what the change does to the loss.
Computes  S = mean + std / sqrt(0.05) over images of ||dY|| / ||Y|| -> `relative_errors`, `upper_mean`; Y as the next norm layer scales it
Departs   dY of a pair leaves out the cross term, so its squared norm is that of dY_w + dY_a.
Costs     1 + R_w + R_a forward passes over the images.
Measured  docs/results: ptq-imagenet, qat-cifar10.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitscape.errors import at_least_one
from bitscape.quant.fold import fold_norms
from bitscape.quant.functional import power_of_two
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import (
    LayerCall,
    LayerNoise,
    calls,
    layer_noise,
    score_table,
    search_by_scores,
    tracked_batches,
)


def relative_errors(call: LayerCall, noise: LayerNoise) -> Tensor:
    """||dY|| / ||Y|| of every pair and image: (R_w, R_a, n)."""
    unit = power_of_two(call.output.abs().max())  # squares of small outputs are zero in float32
    output = call.output.flatten(1) / unit
    of_layer = noise.output_changes(call.input, call.second)
    by_weight, by_input = (torch.stack([change.flatten(1) / unit for change in changes]) for changes in of_layer)
    cross = torch.einsum("wni,ani->wan", by_weight, by_input)
    squares = by_weight.square().sum(2)[:, None] + by_input.square().sum(2)[None] + 2 * cross
    return (squares.clamp(min=0) / output.square().sum(1).clamp(min=1e-20)).sqrt()


def upper_mean(errors: Tensor) -> NDArray[np.float64]:
    """Mean over the last dimension plus std / sqrt(0.05): images whose error is far above the mean count."""
    deviation = errors.std(-1, unbiased=False) / 0.05**0.5
    scores: NDArray[np.float64] = (errors.mean(-1) + deviation).double().cpu().numpy()
    return scores


@dataclass(frozen=True, kw_only=True)
class Local:
    """Relative output error of each layer by itself (control)."""

    images: int = 256
    """Proxy images scored, at least 1."""
    batch_size: int = 16
    """Images a pass."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images, batch_size=self.batch_size)

    def search(self, problem: SearchProblem, *, pick: Pick = "best") -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget."""
        return search_by_scores(problem, self, pick)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone."""
        samples = problem.samples.first(self.images)
        # Folded, a layer's output is what its norm hands on.
        model, names = fold_norms(problem.prepared, samples.first(2).parts[0].inputs), list(problem.free_layers)
        noise = layer_noise(model, names, samples, problem.choices.candidates)
        errors: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in tracked_batches(samples, model, self.batch_size, label="local: batch"):
            for call in calls(model, names, batch.inputs):
                errors[call.name].append(relative_errors(call, noise[call.name]))
        scores = {name: upper_mean(torch.cat(parts, dim=2)) for name, parts in errors.items()}
        return score_table("local", problem.choices, scores)
