"""A network under every corruption of images at every severity: its accuracy, and the bits it spends if they depend on the image."""

import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bitscape.data.batches import Batches
from bitscape.data.corruptions import CLEAN, CORRUPTIONS, SEVERITIES, corrupt, corrupted
from bitscape.engine.evaluate import evaluate
from bitscape.errors import BitscapeError, nearest
from bitscape.progress import track


@dataclass(frozen=True, eq=False)
class Spent:
    """What each of n images of a batch cost."""

    bits: Tensor
    """(n,), mean activation bit-width of each image, weighted as the network defines it."""
    bitops: Tensor
    """(n,), BitOps of each image, its share of the decision on its bits among them."""


@runtime_checkable
class Spending(Protocol):
    """A network whose bits depend on the image."""

    spent: Spent
    """Of the last batch; set by each forward in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network on all images in one quality."""

    corruption: str
    """Name of the corruption; "clean" for none."""
    severity: int
    """1 to 5; 0 for clean images."""
    top1: float
    """Percent."""
    loss: float
    """Mean cross entropy, in nats."""
    images: int
    """Images counted."""
    bits: float | None = None
    """Mean activation bit-width over the images; None for a network that does not report it."""
    bitops: float | None = None
    """Mean BitOps of an image; None likewise."""


@dataclass(frozen=True)
class QualityGrid:
    """A network on clean images, and on the same images under corruptions."""

    cells: tuple[Cell, ...] = field(repr=False)
    """The clean one first, then severity by severity of each corruption."""

    @property
    def clean(self) -> Cell:
        """The cell of clean images."""
        return next(cell for cell in self.cells if cell.corruption == CLEAN)

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions, in order; "clean" is not among them."""
        return tuple(dict.fromkeys(cell.corruption for cell in self.cells if cell.corruption != CLEAN))

    @property
    def severities(self) -> tuple[int, ...]:
        """The severities, ascending, without the 0 of clean images."""
        return tuple(sorted({cell.severity for cell in self.cells if cell.corruption != CLEAN}))

    def mean(self, corruptions: Collection[str] | None = None) -> float:
        """Return the mean top-1, in percent, over all severities of `corruptions`; None = every one of the grid, not clean.

        Raises BitscapeError for a name that the grid does not have, and for no names.
        """
        names = self.corruptions if corruptions is None else corruptions
        _check_names("corruptions", names, self.corruptions)
        return statistics.fmean(cell.top1 for cell in self.cells if cell.corruption in names)


def quality_grid(
    model: nn.Module,
    batches: Batches,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> QualityGrid:
    """Evaluate `model` on the images of `batches` as they are, and in every pair of corruption and severity.

    batches: uint8 images (n, 3, h, w) with labels; its normalization, batch size and order hold for every cell.
    seed: of the corruptions' random numbers.
    Every module's training flag has its former value afterwards. Raises BitscapeError for unknown or repeated corruptions and
    severities or none, before anything is evaluated; for images that cannot be corrupted; for a `spent` that does not hold
    one number an image; and as `evaluate` does.
    """
    _check_names("corruptions", corruptions, tuple(CORRUPTIONS))
    _check_severities(severities)
    corrupt(batches.dataset.images[:1], corruptions[0], severities[0], seed=seed)  # refuses other images than (n, 3, h, w) at once
    pairs = [(CLEAN, 0), *((name, severity) for name in corruptions for severity in severities)]
    return QualityGrid(
        tuple(_cell(model, batches, name, severity, seed) for name, severity in track(pairs, label="corruptions of the images, cell"))
    )


def _cell(model: nn.Module, batches: Batches, name: str, severity: int, seed: int) -> Cell:
    dataset = batches.dataset if name == CLEAN else corrupted(batches.dataset, name, severity, seed=seed)
    with _collecting(model) as sums:
        accuracy = evaluate(model, replace(batches, dataset=dataset))
    bits, bitops = (torch.stack(sums).sum(0) / accuracy.images).tolist() if sums else (None, None)
    return Cell(
        corruption=name, severity=severity, top1=accuracy.top1, loss=accuracy.loss, images=accuracy.images, bits=bits, bitops=bitops
    )


@contextmanager
def _collecting(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, each forward of a spending network adds (2,) to the list: bits and BitOps, summed over the batch."""
    sums: list[Tensor] = []

    def collect(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(module, Spending):
            sums.append(_batch_sums(module.spent, len(inputs[0])))

    handle = model.register_forward_hook(collect)
    try:
        yield sums
    finally:
        handle.remove()


def _batch_sums(spent: Spent, images: int) -> Tensor:
    for name, values in (("bits", spent.bits), ("bitops", spent.bitops)):
        if values.shape != (images,):
            raise BitscapeError(f"spent.{name} has shape {tuple(values.shape)} after {images} images; the network must set ({images},)")
    return torch.stack([spent.bits.double().sum(), spent.bitops.double().sum()])


def _check_names(argument: str, names: Collection[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in names if name not in allowed]
    if unknown or not names or len(set(names)) < len(names):
        hint = nearest(str(unknown[0]), allowed) if unknown else ""
        raise BitscapeError(f"{argument} is {names!r}{hint}; allowed are one or more of {', '.join(allowed)}, each once")


def _check_severities(severities: Sequence[int]) -> None:
    whole = all(type(severity) is int and severity in SEVERITIES for severity in severities)
    if not whole or not severities or len(set(severities)) < len(severities):
        raise BitscapeError(f"severities is {severities!r}; allowed are one or more of the whole numbers 1 to 5, each once")
