"""What was measured of a network at several sizes: in float, at the chosen bits, at controls."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from bitscape.policy import LayerBits
from bitscape.report.compare import Group
from bitscape.report.differences import mean_difference
from bitscape.report.documents import EvaluationDocument
from bitscape.report.material import Material
from bitscape.report.policies import CONTROLS, method_of

FLOAT = "float"
"""What evaluations and groups of runs call the network without bits."""
UNIFORM, RANDOM = CONTROLS
CHOSEN, OTHER = "chosen", "other"
"""Roles beside those of the controls."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A network at one size."""

    name: str
    """Of the method that found its bits."""
    role: str
    """One of `CONTROLS`, `CHOSEN`, `OTHER`, `FLOAT`."""
    bytes: float | None
    """Of its weights; None where they are not known."""
    value: float
    """Of the metric."""
    interval: tuple[float, float] | None
    """95 % interval of the value."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Values of one metric on the same data."""

    metric: str
    where: str
    """Data, and how many samples or what training."""
    all: tuple[Measurement, ...]

    def of(self, *roles: str) -> tuple[Measurement, ...]:
        """Return those of some roles."""
        return tuple(one for one in self.all if one.role in roles)

    def text(self, value: float) -> str:
        """Return a value of the metric as it is written: percentages with two digits."""
        return f"{value:.2f}" if self.metric.endswith("%") else f"{value:.4g}"

    @property
    def sized(self) -> tuple[Measurement, ...]:
        """Quantized networks of known size."""
        return tuple(one for one in self.all if one.role != FLOAT and one.bytes is not None)


def measured(material: Material) -> Measurements | None:
    """Return the measurements that tell most: the chosen policy among them, then by their number.

    None where nothing quantized was measured.
    """
    candidates = [_evaluated(material, documents) for documents in by_data(material).values()]
    recipes = dict.fromkeys(group.recipe for group in material.groups)
    candidates += [_trained(material, recipe) for recipe in recipes]
    quantized = [one for one in candidates if len(one.of(FLOAT)) < len(one.all)]
    return max(quantized, key=lambda one: (bool(one.of(CHOSEN)), len(one.all)), default=None)


def by_data(material: Material) -> dict[tuple[str, str], list[EvaluationDocument]]:
    """Evaluations that can be compared, by data and metric; the float network first."""
    documents = sorted(
        material.inputs.evaluations.values(), key=lambda document: document.evaluated != FLOAT
    )
    pairs = dict.fromkeys((document.data, document.metric) for document in documents)
    return {
        pair: [document for document in documents if (document.data, document.metric) == pair]
        for pair in pairs
    }


def _evaluated(material: Material, documents: Sequence[EvaluationDocument]) -> Measurements:
    first = documents[0]
    measurements = tuple(_of_document(material, document) for document in documents)
    where = f"{PurePath(first.data).name}, {first.samples:,} samples"
    return Measurements(metric=first.metric, where=where, all=measurements)


def _of_document(material: Material, document: EvaluationDocument) -> Measurement:
    cost, policy = document.cost, material.inputs.policies.get(document.evaluated)
    bits = document.bits or (_words(policy.layers.items()) if policy else {})
    method = document.method or (method_of(policy) if policy else document.evaluated)
    chosen = material.chosen is not None and bits == _words(material.chosen.policy.layers.items())
    return Measurement(
        name=method,
        role=FLOAT if document.evaluated == FLOAT else CHOSEN if chosen else _role(method),
        bytes=cost.get("weight_bytes", cost.get("parameter_bytes")),
        value=document.value,
        interval=document.interval,
    )


def _trained(material: Material, recipe: str) -> Measurements:
    """Runs of one recipe, and float ones of any: it is from them that networks are quantized."""
    alike = [one for one in material.groups if one.recipe == recipe or one.method == FLOAT]
    measurements = tuple(_of_group(material, group) for group in alike)
    return Measurements(
        metric="top-1 %", where="validation images, after training", all=measurements
    )


def _of_group(material: Material, group: Group) -> Measurement:
    policy, chosen = group.policy, material.chosen
    is_chosen = policy is not None and chosen is not None and policy.layers == chosen.policy.layers
    is_float = group.method == FLOAT
    ends = mean_difference(list(group.top1.values())).interval
    return Measurement(
        name=group.method,
        role=FLOAT if is_float else CHOSEN if is_chosen else _role(group.method),
        bytes=None if policy is None else material.costs(policy).get("weight_bytes"),
        value=group.mean,
        interval=None if ends is None else (max(ends[0], 0.0), min(ends[1], 100.0)),
    )


def _role(method: str) -> str:
    return next((control for control in CONTROLS if method.startswith(control)), OTHER)


def _words(layers: Iterable[tuple[str, LayerBits]]) -> dict[str, str]:
    return {name: str(bits) for name, bits in layers}
