"""Seam: the mixture search with large class margins.

Paper     Tang, Ouyang, Chai, Bai, Meng, Wang, Zhu: "SEAM: searching transferable mixed-precision quantization policy through large margin
          regularization", ACM MM 2023, arXiv 2302.06845
Idea      Quantization noise of a poor policy shrinks the margins between classes. Features that are close within a class and far
          between classes are a property of the network, not of a data set: bits that keep them suit another data set too.
Computes  margin_i = min over k != y of ||f_i - c_k|| - ||f_i - c_y|| -> `margins`; R = mean max(0, m - margin_i) -> `hinge`
Departs   No code was released and the paper's formula is not available: this regularizer is ours, from standard parts. f is the pooled,
          L2-normalised input of the classifier, c_k the moving mean of class k, normalised again; classes not yet seen are no rivals.
Costs     those of Differentiable; the margin term itself is below 1 % of a step.
Measured  docs/results: transfer-policies, seam-margins.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.engine import Batch, Step, StepRecord
from bitscape.engine.step import Part, count_correct, sum_of
from bitscape.engine.workers import total
from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.quant.convert import batches_of
from bitscape.search.differentiable import Differentiable
from bitscape.search.mixed_network import Mixed
from bitscape.search.proxy_task import ProxyTask

Features = Literal["last", "stages"]
KEPT = 0.9
"""Share of a class's centre that is kept at each step in which the class occurs."""


@contextmanager
def features_of(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block each forward pass leaves the pooled, L2-normalised inputs (n, d) of `layers`, which run in this order."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named["input"]
        pooled = x.flatten(2).mean(2) if x.ndim == 4 else x.flatten(1, -2).mean(1) if x.ndim == 3 else x
        seen.append(functional.normalize(pooled.float(), dim=1))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def feature_layers(model: nn.Module, head: str, which: Features) -> list[nn.Module]:
    """The layers whose inputs are the features: the classifier, for "stages" also every strided layer after the first."""
    layers = quantizable_layers(model)
    first = next(iter(layers))
    strided = [layer for name, layer in layers.items() if name not in (first, head) and _stride(layer) > 1]
    return [*(strided if which == "stages" else []), layers[head]]


def _stride(layer: nn.Module) -> int:
    stride = getattr(layer, "stride", (1,))
    return max(stride) if isinstance(stride, tuple) else int(stride)


def margins(features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Distance to the nearest other class's centre minus that to the own one, (n,), for unit features (n, d) and centres (K, d).

    Rows of `centres` that are not finite stand for classes without one: no rivals. An image without rival, or without own centre,
    has an infinite margin.
    """
    known = centres.isfinite().all(1)
    distances = torch.cdist(features, centres.nan_to_num(0.0), compute_mode="donot_use_mm_for_euclid_dist")
    own = functional.one_hot(labels, len(centres)).bool()
    rival = distances.masked_fill(own | ~known, torch.inf).amin(1)
    return torch.where(known[labels], rival - distances.gather(1, labels[:, None])[:, 0], torch.inf)


def class_centres(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Normalised mean feature (K, d) of each class; NaN for a class without images."""
    sums, counts = _sums(features, labels, classes)
    return functional.normalize(sums, dim=1).masked_fill(counts[:, None] == 0, torch.nan)


def network_margins(model: nn.Module, head: str, images: Tensor, labels: Tensor) -> Tensor:
    """Margins (n,) of labelled images (n, c, h, w), to the classes' centres over these same images; `head` names the model's last layer."""
    layers = feature_layers(model, head, "last")
    with evaluating(model), features_of(layers) as seen:
        for batch in batches_of(images, model, 128):
            model(batch)
    features, labels = torch.cat(seen), labels.to(seen[0].device)
    return margins(features, labels, class_centres(features, labels, int(labels.max()) + 1))


def hinge(features: Tensor, labels: Tensor, centres: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - margin_i); features (n, d), centres (K, d)."""
    return (margin - margins(features, labels, centres)).clamp(min=0).mean()


def fisher_ratio(features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Mean squared distance to the own centre over that of the centres to their mean."""
    known = centres.isfinite().all(1)
    if int(known.sum()) < 2:
        return features.sum() * 0.0
    between = (centres[known] - centres[known].mean(0)).square().sum(1).mean()
    counted = known[labels]
    within = (features - centres.nan_to_num(0.0)[labels]).square().sum(1)[counted].sum() / counted.sum().clamp(min=1)
    return within / between.clamp(min=1e-6)


@dataclass(kw_only=True)
class SeamStep:
    """The mixture's step with the margin term; centres of each feature layer move with the network, or stay."""

    mixed: Mixed = field(repr=False)
    layers: list[nn.Module] = field(repr=False)
    classes: int
    weight: float
    margin: float
    term: Literal["hinge", "fisher-ratio"]
    fixed: list[Tensor] | None
    """Centres of the float network, or None for moving ones."""
    centres: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """One pass."""
        self.mixed.keep_budget()
        return sum_of([self._of_part(model, part) for part in batch.parts])

    def _of_part(self, model: nn.Module, part: Part) -> StepRecord:
        labels = part.labels
        with features_of(self.layers) as features:
            logits = model(part.images)
        value = part.loss(logits, labels)
        centres = [self._moved(at, each.detach(), labels) for at, each in enumerate(features)] if self.fixed is None else self.fixed
        terms = [self._term(each, labels, about) for each, about in zip(features, centres, strict=True)]
        regularizer = torch.stack(terms).mean()
        ((value + self.weight * regularizer) * part.share).backward()
        margin = _finite_mean(margins(features[-1].detach(), labels, centres[-1]))
        extras = {"margin_term": regularizer.detach() * part.share, "margin": margin * part.share}
        return StepRecord(loss=value.detach() * part.share, correct=count_correct(logits, labels), extras=extras)

    def _term(self, features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
        return hinge(features, labels, centres, self.margin) if self.term == "hinge" else fisher_ratio(features, labels, centres)

    def _moved(self, at: int, features: Tensor, labels: Tensor) -> Tensor:
        """The centres with this batch of all workers taken in."""
        sums, counts = (total(part) for part in _sums(features, labels, self.classes))
        mean = functional.normalize(sums, dim=1)
        before = self.centres.get(at, torch.full_like(mean, torch.nan))
        blended = functional.normalize(KEPT * before + (1 - KEPT) * mean, dim=1)
        fresh = torch.where(before.isfinite(), blended, mean)
        self.centres[at] = torch.where(counts[:, None] > 0, fresh, before)
        return self.centres[at]

    def state_dict(self) -> dict[str, Tensor]:
        """The moving centres."""
        return {str(at): centres for at, centres in self.centres.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        device = next(self.mixed.model.parameters()).device
        self.centres = {int(at): centres.to(device) for at, centres in state.items()}


def _sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the features (K, d) and number of images (K,) of each class."""
    chosen = functional.one_hot(labels, classes).to(features.dtype)
    return chosen.T @ features, chosen.sum(0)


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return values.masked_fill(~finite, 0.0).sum() / finite.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Seam(Differentiable):
    """The mixture search with a large-margin term."""

    margin_weight: float = 1.0
    """Weight of the margin term beside the loss."""
    margin: float = 0.5
    """Margin asked for, on features of length 1; at most 2."""
    term: Literal["hinge", "fisher-ratio"] = "hinge"
    """Hinge on each image's margin, or scatter within classes over scatter between them."""
    features: Features = "last"
    """Features at the classifier, or also at the end of every stage (before each strided layer)."""
    centres: Literal["moving", "float"] = "moving"
    """Class centres of the network as it changes, or those of the float network, fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin_weight < math.inf:
            raise BitscapeError(f"margin_weight = {self.margin_weight}: it must be above 0 and finite")
        if not 0 < self.margin <= 2:
            raise BitscapeError(f"margin = {self.margin}: it must be above 0 and at most 2; features have length 1")

    def step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """The mixture's step with the margin term."""
        classes = int(learned.batches.dataset.labels.max()) + 1
        return SeamStep(
            mixed=mixed,
            layers=feature_layers(mixed.model, mixed.head, self.features),
            classes=classes,
            weight=self.margin_weight,
            margin=self.margin,
            term=self.term,
            fixed=_float_centres(learned, mixed.head, self.features, classes) if self.centres == "float" else None,
        )


def _float_centres(learned: ProxyTask, head: str, which: Features, classes: int) -> list[Tensor]:
    data, layers = learned.batches.dataset, feature_layers(learned.model, head, which)
    with evaluating(learned.model), features_of(layers) as seen:
        for batch in batches_of(data.images, learned.model, 128):
            learned.model(batch)
    labels = data.labels.to(seen[0].device)
    return [class_centres(torch.cat(seen[at :: len(layers)]), labels, classes) for at in range(len(layers))]
