"""Seam: the mixture search with large class margins.

Paper     Tang, Ouyang, Chai, Bai, Meng, Wang, Zhu: "SEAM: searching transferable mixed-precision quantization policy through large margin
          regularization", ACM MM 2023, arXiv 2302.06845
Idea      Quantization noise of a poor policy shrinks the margins between classes. Features that are close within a class and far
          between classes are a property of the network, not of a data set: bits that keep them suit another data set too.
Computes  margin_i = min over k != y of ||f_i - c_k|| - ||f_i - c_y|| -> `margins`; R = mean max(0, m - margin_i) -> `hinge`
Departs   No code was released and the paper's formula is not available: this regularizer is ours, from standard parts. f is the pooled,
          L2-normalized input of the classifier, c_k the moving mean of class k, normalized again; classes not yet seen are no rivals.
Costs     those of Differentiable; a step's distances (batch x classes), at most one matrix a feature layer and one for the record.
Measured  docs/results-searches: transfer-policies, seam-margins.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.calling import call
from bitscape.data.samples import Samples
from bitscape.engine import Batch, Step, StepRecord
from bitscape.engine.step import Part, sum_of
from bitscape.engine.task import Classes
from bitscape.engine.workers import total
from bitscape.errors import BitscapeError
from bitscape.models.layers import CONVOLUTIONS, quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.quant.convert import batches_of
from bitscape.searches.mixed_network import Mixed
from bitscape.searches.mixture_search import MixtureSettings
from bitscape.searches.proxy_task import ProxyTask

Features = Literal["last", "stages"]
KEPT = 0.9
"""Share of a class's center that is kept at each step in which the class occurs."""


def labels_of(targets: Tensor) -> Tensor:
    """Return the labels (n,), the likeliest ones where the targets are probabilities (n, classes)."""
    return targets.argmax(1) if targets.is_floating_point() else targets.long()


@contextmanager
def features_of(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block each forward pass leaves the pooled, L2-normalized inputs (n, d) of `layers`, which run in this order."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named["input"]
        if isinstance(layer, nn.Linear):
            x = x.movedim(-1, 1)
        pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
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
    return max(layer.stride) if isinstance(layer, CONVOLUTIONS) else 1


def margins(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Distance to the nearest other class's center minus that to the own one, (n,), for unit features (n, d) and centers (K, d).

    Rows of `centers` that are not finite stand for classes without one: no rivals. An image without rival, or without own center,
    has an infinite margin.
    """
    known = centers.isfinite().all(1)
    distances = torch.cdist(features, centers.nan_to_num(0.0), compute_mode="donot_use_mm_for_euclid_dist")
    own = functional.one_hot(labels, len(centers)).bool()
    rival = distances.masked_fill(own | ~known, torch.inf).amin(1)
    return torch.where(known[labels], rival - distances.gather(1, labels[:, None])[:, 0], torch.inf)


def class_centers(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Normalized mean feature (K, d) of each class; NaN for a class without images."""
    sums, counts = _sums(features, labels, classes)
    return functional.normalize(sums, dim=1).masked_fill(counts[:, None] == 0, torch.nan)


def network_margins(model: nn.Module, head: str, images: Tensor, labels: Tensor) -> Tensor:
    """Margins (n,) of labelled images (n, c, h, w), to the classes' centers over these same images; `head` names the model's last layer."""
    layers = feature_layers(model, head, "last")
    with evaluating(model), features_of(layers) as seen:
        for batch in batches_of(images, model, 128):
            model(batch)
    features, labels = torch.cat(seen), labels.to(seen[0].device)
    return margins(features, labels, class_centers(features, labels, int(labels.max()) + 1))


def hinge(features: Tensor, labels: Tensor, centers: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - margin_i); features (n, d), centers (K, d)."""
    return (margin - margins(features, labels, centers)).clamp(min=0).mean()


def fisher_ratio(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Mean squared distance to the own center over that of the centers to their mean."""
    known = centers.isfinite().all(1)
    if int(known.sum()) < 2:
        return features.sum() * 0.0
    between = (centers[known] - centers[known].mean(0)).square().sum(1).mean()
    counted = known[labels]
    within = (features - centers.nan_to_num(0.0)[labels]).square().sum(1)[counted].sum() / counted.sum().clamp(min=1)
    return within / between.clamp(min=1e-6)


@dataclass(kw_only=True)
class SeamStep:
    """The mixture's step with the margin term; centers of each feature layer move with the network, or stay."""

    mixed: Mixed = field(repr=False)
    layers: list[nn.Module] = field(repr=False)
    classes: int
    weight: float
    margin: float
    term: Literal["hinge", "fisher-ratio"]
    fixed: list[Tensor] | None
    """Centers of the float network, or None for moving ones."""
    centers: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """One pass."""
        self.mixed.keep_budget()
        return sum_of([self._of_part(model, part) for part in batch.parts])

    def _of_part(self, model: nn.Module, part: Part) -> StepRecord:
        labels = labels_of(part.targets)
        with features_of(self.layers) as features:
            logits = part.outputs(model)
        _check_rows(features, labels)
        value = part.loss(logits, part.targets)
        centers = [self._moved(at, each.detach(), labels) for at, each in enumerate(features)] if self.fixed is None else self.fixed
        terms = [self._term(each, labels, about) for each, about in zip(features, centers, strict=True)]
        regularizer = torch.stack(terms).mean()
        ((value + self.weight * regularizer) * part.share).backward()
        margin = _finite_mean(margins(features[-1].detach(), labels, centers[-1]))
        extras = {"margin_term": regularizer.detach() * part.share, "margin": margin * part.share}
        return StepRecord(loss=value.detach() * part.share, sums=part.counted(logits), extras=extras)

    def _term(self, features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        return hinge(features, labels, centers, self.margin) if self.term == "hinge" else fisher_ratio(features, labels, centers)

    def _moved(self, at: int, features: Tensor, labels: Tensor) -> Tensor:
        """The centers with this batch of all workers taken in."""
        sums, counts = (total(part) for part in _sums(features, labels, self.classes))
        mean = functional.normalize(sums, dim=1)
        before = self.centers.get(at, torch.full_like(mean, torch.nan))
        blended = functional.normalize(KEPT * before + (1 - KEPT) * mean, dim=1)
        fresh = torch.where(before.isfinite(), blended, mean)
        self.centers[at] = torch.where(counts[:, None] > 0, fresh, before)
        return self.centers[at]

    def state_dict(self) -> dict[str, Tensor]:
        """The moving centers."""
        return {str(at): centers for at, centers in self.centers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        device = next(self.mixed.model.parameters()).device
        self.centers = {int(at): centers.to(device) for at, centers in state.items()}


def _sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the features (K, d) and number of images (K,) of each class."""
    chosen = functional.one_hot(labels, classes).to(features.dtype)
    return chosen.T @ features, chosen.sum(0)


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return values.masked_fill(~finite, 0.0).sum() / finite.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Seam(MixtureSettings):
    """Settings of the mixture search with a large-margin term."""

    margin_weight: float = 1.0
    """Weight of the margin term beside the loss."""
    margin: float = 0.5
    """Margin asked for, on features of length 1; at most 2."""
    term: Literal["hinge", "fisher-ratio"] = "hinge"
    """Hinge on each image's margin, or scatter within classes over scatter between them."""
    features: Features = "last"
    """Features at the classifier, or also at the end of every stage (before each strided layer)."""
    centers: Literal["moving", "float"] = "moving"
    """Class centers of the network as it changes, or those of the float network, fixed."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if not 0 < self.margin_weight < math.inf:
            raise BitscapeError(f"margin_weight = {self.margin_weight}: it must be above 0 and finite")
        if not 0 < self.margin <= 2:
            raise BitscapeError(f"margin = {self.margin}: it must be above 0 and at most 2; features have length 1")

    def make_step(self, mixed: Mixed, learned: ProxyTask) -> Step:
        """The mixture's step with the margin term. Raises BitscapeError for outputs that are not logits of classes."""
        if not isinstance(learned.task, Classes):
            raise BitscapeError(
                f"method seam needs logits of classes, whose margins it keeps, and the task is {learned.task.name!r}; "
                "use method differentiable or asga"
            )
        labels = labels_of(learned.data.targets)
        classes = int(labels.max()) + 1
        return SeamStep(
            mixed=mixed,
            layers=feature_layers(mixed.model, mixed.head, self.features),
            classes=classes,
            weight=self.margin_weight,
            margin=self.margin,
            term=self.term,
            fixed=_float_centers(learned, mixed.head, self.features, classes) if self.centers == "float" else None,
        )


def _float_centers(learned: ProxyTask, head: str, which: Features, classes: int) -> list[Tensor]:
    """Centers (K, d) of every input of the feature layers, in the order in which these run."""
    runs = []
    with evaluating(learned.model):
        for inputs in batches_of(Samples([learned.data]), learned.model, 128):
            with features_of(feature_layers(learned.model, head, which)) as features:
                call(learned.model, inputs)
            runs.append(features)
    labels = labels_of(learned.data.targets).to(runs[0][0].device)
    columns = [torch.cat(parts) for parts in zip(*runs, strict=True)]
    _check_rows(columns, labels)
    return [class_centers(column, labels, classes) for column in columns]


def _check_rows(features: list[Tensor], labels: Tensor) -> None:
    rows = {len(values) for values in features} - {len(labels)}
    if rows:
        raise BitscapeError(
            f"method seam needs one feature for each sample, and a layer is called with {min(rows)} rows for {len(labels)} samples; "
            "use method differentiable or asga"
        )
