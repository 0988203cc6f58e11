"""Fisher: the layer's output error, weighted by the squared gradient of the loss.

Paper     Theis, Korshunova, Tejani, Huszar: "Faster gaze prediction with dense networks and Fisher pruning", 2018,
          arXiv 1801.05787, for the score of a perturbed output; Choi, El-Khamy, Lee: "Towards the limit of network
          quantization", ICLR 2017, for bits
Idea      To second order the loss rises by the Fisher information times the squared output change. The Fisher of the network's own
          softmax needs no labels, so that any images can be the proxy. Other outputs have the loss of their task: answers of yes or
          no have their own probabilities, and any other values are summed with random signs (Gauss-Newton).
Computes  S(layer, pair) = mean over images of sum_i G_i^2 dY_i^2 -> `pair_scores`; with `variant="directional"`, (sum_i G_i dY_i)^2
Departs   No labels are drawn (ours): with H = diag(p) - p p^T = S S^T at the logits, a backward pass of the logits weighted by S r,
          r random signs, has squares that expect to the same diagonal, and do not vary with labels that are hardly ever drawn.
          `draws` passes share signs such that the products of the likeliest classes cancel -> `softmax_roots`. Relative error of
          a layer's score, 32 images, ResNet-20: 2.9 and 0.98 with 1 and 4 labels drawn, 0.31 and 0.023 with 1 and 4 sign draws.
          dY of a pair is dY_w + dY_a: the cross term is dropped, which makes R_w + R_a runs of a layer enough for R_w * R_a pairs.
          dY is that of the network that will run: weights rounded as repair rounds them, and each channel without the mean shift that
          repair takes back -> `repaired_noise`. For a network that will be trained (`for_training`) dY is of nearest rounding, and only
          a tenth of the weight noise counts: dY = sqrt(0.1) dY_w + dY_a. Training moves weights to their grid wherever they start, but
          cannot give back what coarse activations lost. The tenth is ours, chosen on ResNet-20/CIFAR-10 among 1, 0.1 and 0.01 at one
          budget and one seed.
Costs     2 + 2 draws + R_w + R_a forward passes over the images, 512 MB for a pass, and R_w times the rounding of repair.
Measured  CIFAR-10, BitOps of W3A3, 256 images, default repair, 2,000 test images, two draws, scores of this noise / of nearest
          rounding / uniform bits: ResNet-20 89.2 88.4 / 86.3 86.2 / 88.9 88.1; ResNet-44 91.3 91.1 / 89.9 89.8 / 90.7 91.5.
          The rows of docs/results are of scores by nearest rounding and drawn labels.
          After training, ResNet-20: level with uniform at the BitOps of W4A4 and W3A3, ahead at 2.5 bits by an interval that still
          touches zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitscape.errors import BitscapeError, at_least_one
from bitscape.quant.fold import fold_norms
from bitscape.searches.problem import Pick, SearchOption, SearchProblem, SearchResult
from bitscape.searches.repaired import repaired_noise
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import (
    GradedCall,
    LayerNoise,
    candidate_widths,
    finish,
    images_a_pass,
    layer_noise,
    score_table,
    tracked_batches,
    visit_gradients,
)

Variant = Literal["elementwise", "directional"]


CACHED_ELEMENTS = 1 << 14
"""Of each weighted change, for each core of a CPU: with twelve of them 768 KB."""


def pair_scores(call: GradedCall, noise: LayerNoise, variant: Variant, weight_share: float) -> Tensor:
    """Scores (R_w, R_a) of one layer on one batch, summed over its images, float64.

    `weight_share` multiplies the squared weight noise.
    """
    root = math.sqrt(weight_share)
    scores = [_scores_of_part(part, noise, variant, root) for part in call.parts(noise.layer)]
    return torch.stack(scores).sum(0)


def _scores_of_part(part: GradedCall, noise: LayerNoise, variant: Variant, root: float) -> Tensor:
    by_weight, by_input = noise.output_changes(part.input, part.second)
    changes, count = [*by_weight, *by_input], len(by_weight)
    if variant == "directional":
        return torch.stack([_along(changes, count, gradient, root) for gradient in part.gradients]).mean(0)
    products = weighted_products(changes, root_mean_square(part.gradients))
    squares = products.diagonal()
    return root**2 * squares[:count, None] + squares[None, count:] + 2 * root * products[:count, count:]


def _along(changes: Sequence[Tensor], count: int, gradient: Tensor, root: float) -> Tensor:
    along = torch.stack([(gradient * change).flatten(1).sum(1) for change in changes]).double()
    per_image = (root * along[:count, None] + along[None, count:]).square()
    return per_image.sum(2)


def root_mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """Of each element over tensors of one shape."""
    total = tensors[0].square()
    for tensor in tensors[1:]:
        total.addcmul_(tensor, tensor)
    return total.div_(len(tensors)).sqrt_()


def weighted_products(changes: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """sum_i G_i^2 dY_i dY'_i of every two of the R changes, all in the gradient's shape: float64 (R, R)."""
    products = gradient.new_zeros(len(changes), len(changes), dtype=torch.float64)
    for *pieces, of_gradient in zip(*_pieces([*changes, gradient]), strict=True):
        weighted = torch.stack(pieces).mul_(of_gradient)
        products += weighted @ weighted.T
    return products


def _pieces(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Each tensor in flat pieces, elements of all in the same order: on a CPU small enough for its cache, else in one."""
    first = tensors[0] if _is_dense(tensors[0]) else tensors[0].contiguous()
    alike = [t if t.stride() == first.stride() else torch.empty_like(first).copy_(t) for t in tensors]
    on_cpu = first.device.type == "cpu"
    size = CACHED_ELEMENTS * torch.get_num_threads() if on_cpu else first.numel()
    return [_storage_order(tensor).split(size) for tensor in alike]


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory, images outermost: contiguous or channels_last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _storage_order(x: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory, without a copy."""
    return x.as_strided((x.numel(),), (1,))


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Fisher-weighted output error (default search)."""

    images: int = 256
    """Proxy images scored, at least 1."""
    draws: int = 4
    """Backward passes a batch, at least 1: powers of two are best, and as many as there are classes are exact."""
    batch_size: int | None = None
    """Images a pass; None: as many as keep what a pass holds within 512 MB."""
    weight_share_for_training: float = 0.1
    """Share of the squared weight noise that counts when `search` is told `for_training`, from 0 to 1."""
    variant: Variant = "elementwise"
    """Square each element's loss change, or the sum of them for an image."""

    options: ClassVar[frozenset[SearchOption]] = frozenset({"pick", "for_training"})

    def __post_init__(self) -> None:
        at_least_one(images=self.images, draws=self.draws, batch_size=self.batch_size or 1)
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
        names, samples = list(problem.free_layers), problem.samples.first(self.images)
        batch_size = self.batch_size or images_a_pass(problem.network, self.draws)
        if for_training:  # which moves the weights from where repair rounds them to
            model = problem.prepared
            noise = layer_noise(model, names, samples, problem.choices.candidates)
        else:
            model = fold_norms(problem.prepared, samples.first(2).parts[0].inputs)
            candidates = problem.choices.candidates
            noise = repaired_noise(model, names, samples, candidates, batch_size, problem.quantizer)
        generator = torch.Generator().manual_seed(problem.seed)
        weight_bits, activation_bits = candidate_widths(problem.choices.candidates)
        weight_share = self.weight_share_for_training if for_training else 1.0
        totals = {name: torch.zeros(len(weight_bits), len(activation_bits), dtype=torch.float64) for name in names}

        def visit(call: GradedCall) -> None:
            totals[call.name] += pair_scores(call, noise[call.name], self.variant, weight_share).cpu()

        for batch in tracked_batches(samples, model, batch_size, label="fisher: batch"):
            visit_gradients(model, names, batch, problem.meaning, generator, visit, self.draws)
        return score_table("fisher", problem.choices, {name: (total / len(samples)).numpy() for name, total in totals.items()})
