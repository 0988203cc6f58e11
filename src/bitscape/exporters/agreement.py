"""How far two networks agree on images, output by output: values, classes, and the last bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.interface import as_samples
from bitscape.models.modes import evaluating
from bitscape.models.named_outputs import named_outputs
from bitscape.nested import tensors_in
from bitscape.runtimes.sessions import Session

Array = NDArray[Any]
BATCH = 32
LEAST_SAME_CLASS, SMALL_DIFFERENCE, LARGE_DIFFERENCE = 0.8, 0.02, 0.25
"""Outputs that are more than so far off, by their norm, were computed otherwise; less far if fewer images have the class of exact integers:
a large difference costs classes, while a small one changes near-tied classes. Roundings of additions differ in OpenVINO."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two networks' values of one output have in common."""

    images: int
    """Images compared."""
    difference: float
    """Norm of the difference over the norm of the expected values; share of the values that differ where these are no floats."""
    identical: float
    """Share of images with equal values, bit for bit."""
    same_class: float | None
    """Share of images with the same largest value; None where an output is not (images, classes)."""


def is_scores(values: Array, images: int) -> bool:
    """Whether an output for so many images holds the scores of classes: floats (images, classes), two classes at least."""
    shape = values.shape
    return np.issubdtype(values.dtype, np.floating) and len(shape) == 2 and shape[0] == images and shape[1] > 1


class Comparison:
    """Compares outputs batch after batch, and keeps sums alone."""

    def __init__(self, classes: bool | None = None) -> None:
        self._classes = classes
        """Whether outputs (images, k) are logits of classes; None = where there is one such output."""
        self._sums: dict[str, _Sums] = {}

    def add(self, images: int, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> None:
        """Compare the outputs for a batch of so many images, by name.

        Raises:
            BitscapeError: other outputs than expected, by name or shape.
        """
        shapes = [{name: values.shape for name, values in outputs.items()} for outputs in (expected, actual)]
        if shapes[0] != shapes[1]:
            raise BitscapeError(f"outputs are {shapes[1]}, and {shapes[0]} were expected")
        scores = [name for name, values in expected.items() if is_scores(values, images)]
        if self._classes is False or (self._classes is None and len(scores) > 1):
            scores = []
        for name, values in expected.items():
            self._sums.setdefault(name, _Sums()).add(images, values, actual[name], classes=name in scores)

    def result(self) -> dict[str, Agreement]:
        """Name of each output -> how far it agrees on all images so far."""
        return {name: sums.agreement() for name, sums in self._sums.items()}


@dataclass
class _Sums:
    images: int = 0
    values: int = 0
    differing: int = 0
    squares: float = 0.0
    squared_differences: float = 0.0
    identical: int = 0
    same_class: int = 0
    has_classes: bool = False
    has_floats: bool = False

    def add(self, images: int, expected: Array, actual: Array, *, classes: bool) -> None:
        has_images, both_nan = expected.shape[:1] == (images,), (expected != expected) & (actual != actual)
        equal = (expected == actual) | both_nan
        self.images += images
        self.values += equal.size
        self.differing += int(equal.size - equal.sum())
        self.identical += int(equal.reshape(images, -1).all(1).sum()) if has_images else images * bool(equal.all())
        self.has_floats = np.issubdtype(expected.dtype, np.floating)
        self.has_classes = classes
        if self.has_classes:
            self.same_class += int((expected.argmax(1) == actual.argmax(1)).sum())
        if self.has_floats:
            known = np.where(np.isfinite(expected), expected, 0).astype(np.float64)
            self.squares += float((known**2).sum())
            self.squared_differences += float((_differences(expected, actual, equal) ** 2).sum())

    def agreement(self) -> Agreement:
        return Agreement(
            images=self.images,
            difference=self._relative() if self.has_floats else self.differing / max(1, self.values),
            identical=self.identical / self.images,
            same_class=self.same_class / self.images if self.has_classes else None,
        )

    def _relative(self) -> float:
        if not self.squares:
            return math.inf if self.squared_differences else 0.0
        return math.sqrt(self.squared_differences / self.squares)


def _differences(expected: Array, actual: Array, equal: Array) -> Array:
    """Float64 differences; infinite where one of two values is not a number or infinite, and the other is not the same."""
    with np.errstate(invalid="ignore"):
        off = np.where(equal, 0.0, actual.astype(np.float64) - expected.astype(np.float64))
    return np.where(np.isnan(off), np.inf, off)


def compare_outputs(
    integers: IntegerNetwork, simulated: nn.Module, session: Session, data: Samples | Inputs, *, classes: bool | None = None
) -> tuple[dict[str, Agreement], dict[str, Agreement]]:
    """Run a file on samples and compare every output, by name, with two networks.

    Args:
        integers: what the file was made of.
        simulated: the network before the export.
        session: the file in its runtime.
        data: samples, or what the network is called with.
        classes: whether outputs (n, k) are logits of classes; None = where there is one such output.

    Returns:
        How far the file agrees with exact integers, and with the network as it was simulated.
    """
    exact, before = Comparison(classes), Comparison(classes)
    for batch in as_samples(data).batches(BATCH):
        outputs = dict(zip(session.outputs, session.run(integers.interface.feed(batch.inputs)), strict=True))
        exact.add(len(batch), _arrays(run_integers(integers, batch.inputs)), outputs)
        with torch.no_grad():
            before.add(len(batch), _arrays(named_outputs(call(simulated, batch.inputs))), outputs)
    return exact.result(), before.result()


def require_equal(saved: nn.Module, loaded: nn.Module, data: Samples | Inputs, path: object) -> None:
    """Raise BitscapeError unless two networks give the same bits; `path` is the file that one was read from."""
    with evaluating(saved), evaluating(loaded):
        for batch in as_samples(data).batches(BATCH):
            pairs = [list(tensors_in(call(network, batch.inputs))) for network in (saved, loaded)]
            if len(pairs[0]) != len(pairs[1]) or not all(map(torch.equal, *pairs)):
                raise BitscapeError(f"{path}: read back, its outputs differ from the network's that was saved; the file is not kept")


def require_same(exact: Mapping[str, Agreement], runtime: str) -> None:
    """Raise BitscapeError if an output is further from exact integers than roundings of additions explain."""
    for name, agreement in exact.items():
        if computed_otherwise(agreement):
            raise BitscapeError(
                f"{runtime} computes output {name} otherwise than the file says: {100 * agreement.difference:.2g} % off exact integers, "
                f"and their class on {percent(agreement.same_class)} of the images; do not use the file with this version, or export for "
                "another runtime"
            )


def computed_otherwise(exact: Agreement) -> bool:
    """Whether a runtime's outputs are further from exact integers than roundings of additions explain."""
    other_classes = exact.same_class is not None and exact.same_class < LEAST_SAME_CLASS
    return exact.difference > (SMALL_DIFFERENCE if other_classes else LARGE_DIFFERENCE)


def percent(share: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _arrays(outputs: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in outputs.items()}
