"""Topological: how varied, over images, the shapes are in which a layer's feature maps connect; it never looks at quantization noise.

Paper     "GMPQ-TE", NeurIPS 2025: the topological entropy of feature maps
Idea      Read a feature map as the weights of a graph and let its strongest entries in as edges, one by one. When the first hole closes
          is a fact of the map's shape; a layer where that time varies much over images is held to carry more, and gets more bits.
Computes  birth time of the first hole -> `birth_times`; entropy of a channel over images -> `channel_entropy`; mean over channels ->
          `layer_entropy`; maximize sum H (b_w + b_a) / 2 under the budget, as scores S(pair) = -H (b_w + b_a) / 2
Departs   The paper has one width a layer; that both widths of a pair count by half is ours. A layer's map is its output behind its norm
          and a ReLU, whichever activation the network has there, and before any sum with a shortcut. A birth time is the rank among
          different undirected edges, an edge as strong as the larger of its two entries. Maps that are not square are cropped to
          their center. Images are those of the most frequent label if there are labels and it has enough, else the first ones.
          Layers without maps of at least 2 dimensions (linear ones, 1x1 outputs) score 0, so that they get what is left of the budget.
Costs     1 forward pass over the images and the graphs: of 128 images 1 s for ResNet-20, 33 s for MobileNetV2, on one thread.
Measured  docs/transfer: transfer-scores. Noise alone scores 0 at side 3 and 3.2 nats at side 56: compare with `map_side_only`,
          which knows nothing else.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import at_least_one
from bitscape.quant.fold import fold_norms
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import calls, candidate_widths, score_table, search_by_scores, tracked_batches

LEAST_BIRTHS = 0.1
"""Share of images below which a channel without holes is left out."""
EDGES_PER_NODE = 4
"""Edges looked at first; a random graph closes its first hole before it has one edge per node."""


def birth_times(maps: Tensor) -> NDArray[np.int64]:
    """Birth time of the first hole of each map (m, n, n), shape (m,); 0 where there is none.

    Entries off the diagonal become undirected edges in descending order. The birth time is the rank, from 1, of the first edge whose
    ends are connected already without a common neighbor; entries that are not positive are no edges.
    """
    nodes = maps.shape[-1]
    ends = np.stack(np.triu_indices(nodes, 1))
    if not ends.size:
        return np.zeros(len(maps), dtype=np.int64)
    symmetric = torch.maximum(maps, maps.mT).flatten(1)
    strengths = symmetric[:, torch.from_numpy(ends[0] * nodes + ends[1])]
    births, open_ends = _first_holes(strengths, ends, nodes, EDGES_PER_NODE * nodes)
    if len(open_ends):
        births[open_ends], _ = _first_holes(strengths[torch.from_numpy(open_ends)], ends, nodes, strengths.shape[1])
    return births


def _first_holes(strengths: Tensor, ends: NDArray[np.int64], nodes: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Birth times (m,), 0 for none, within the `most` strongest edges; and which maps had neither a hole nor their last edge by then."""
    most = min(most, strengths.shape[1])
    ordered = strengths.topk(most)
    order, positive = ordered.indices.numpy(), (ordered.values > 0).numpy()
    births = np.zeros(len(order), dtype=np.int64)
    component = np.tile(np.arange(nodes), (len(order), 1))
    linked = np.zeros((len(order), nodes, nodes), dtype=bool)
    active = np.arange(len(order))
    for rank in range(most):
        active = active[positive[active, rank]]
        one, other = ends[:, order[active, rank]]
        first, second = component[active, one], component[active, other]
        closes = (first == second) & ~(linked[active, one] & linked[active, other]).any(1)
        births[active[closes]] = rank + 1
        active, one, other, first, second = (values[~closes] for values in (active, one, other, first, second))
        if not len(active):
            break
        linked[active, one, other] = linked[active, other, one] = True
        joined = component[active]
        component[active] = np.where(joined == second[:, None], first[:, None], joined)
    return births, active if most < strengths.shape[1] else active[:0]


def channel_entropy(births: NDArray[np.int64]) -> float | None:
    """Entropy in nats of the birth times of one channel over images (n,); None if fewer than a tenth of the images have one."""
    found = births[births > 0]
    if len(found) < LEAST_BIRTHS * len(births) or not len(found):
        return None
    shares = np.unique(found, return_counts=True)[1] / len(found)
    return float(-(shares * np.log(shares)).sum())


def layer_entropy(births: NDArray[np.int64]) -> float:
    """Mean entropy of the channels that count, of birth times (n, channels); 0 if none does."""
    entropies = [entropy for channel in births.T if (entropy := channel_entropy(channel)) is not None]
    return float(np.mean(entropies)) if entropies else 0.0


def chosen_samples(samples: Samples, labels: Tensor | None, count: int) -> Samples:
    """`count` samples of the most frequent label, or the first `count` where there are no labels or too few of one."""
    if labels is not None:
        of_label = labels == labels.mode().values
        if int(of_label.sum()) >= count:
            masks = of_label.split([len(part) for part in samples.parts])
            picked = Samples(part.rows(mask.nonzero()[:, 0]) for part, mask in zip(samples.parts, masks, strict=True))
            return picked.first(count)
    return samples.first(count)


def square_maps(output: Tensor) -> Tensor | None:
    """The center squares of a layer's output after ReLU (n, c, side, side); None for outputs that are no maps."""
    if output.ndim != 4:
        return None
    height, width = output.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return output[:, :, top : top + side, left : left + side].relu().float().cpu()


@dataclass(frozen=True, kw_only=True)
class Topological:
    """Topological entropy of feature maps (paper baseline)."""

    images: int = 128
    """Proxy images, at least 1; of one label where the problem has labels and enough of one."""
    batch_size: int = 16
    """Images a pass."""
    map_side_only: bool = False
    """Control: the logarithm of the map's side in place of the entropy."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images, batch_size=self.batch_size)

    def search(self, problem: SearchProblem, *, pick: Pick = "best") -> SearchResult:
        """Score every free layer and candidate, then allocate bits exactly within the budget."""
        return search_by_scores(problem, self, pick)

    def score(self, problem: SearchProblem) -> ScoreTable:
        """The table of scores alone."""
        samples = chosen_samples(problem.samples, problem.labels, self.images)
        # Folded, a layer's output is what its norm hands on.
        model, names = fold_norms(problem.prepared, samples.first(2).parts[0].inputs), list(problem.free_layers)
        values = _log_sides(model, names, samples.example) if self.map_side_only else self._entropies(model, names, samples)
        weight_bits, activation_bits = (np.array(bits) for bits in candidate_widths(problem.choices.candidates))
        scores = {name: -value * (weight_bits[:, None] + activation_bits) / 2 for name, value in values.items()}
        return score_table("topological", problem.choices, scores)

    def _entropies(self, model: nn.Module, names: list[str], samples: Samples) -> dict[str, float]:
        births: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
        for batch in tracked_batches(samples, model, self.batch_size, label="topological: batch"):
            for call in calls(model, names, batch.inputs):
                if (maps := square_maps(call.output)) is not None:
                    births[call.name].append(birth_times(maps.flatten(0, 1)).reshape(maps.shape[:2]))
        return {name: layer_entropy(np.concatenate(parts)) if parts else 0.0 for name, parts in births.items()}


def _log_sides(model: nn.Module, names: list[str], example: Inputs) -> dict[str, float]:
    maps = {call.name: square_maps(call.output) for call in calls(model, names, example)}
    return {name: 0.0 if found is None else math.log(found.shape[-1]) for name, found in maps.items()}
