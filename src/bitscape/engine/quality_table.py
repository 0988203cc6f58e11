"""A network under every corruption of images at every severity: its accuracy, and the bits it spends if they depend on the image."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from bitscape.data.batches import Batches
from bitscape.data.corruptions import CLEAN, CORRUPTIONS, SEVERITIES, corrupt, corrupted
from bitscape.engine.evaluate import evaluate
from bitscape.engine.spending import Spent, noting_spent
from bitscape.errors import BitscapeError, nearest
from bitscape.progress import track


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
class QualityTable:
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
        """Return the mean top-1, in percent, over all severities of `corruptions`; None = every one of the table, not clean.

        Raises BitscapeError for a name that the table does not have, and for no names.
        """
        names = self.corruptions if corruptions is None else corruptions
        _check_names("corruptions", names, self.corruptions)
        return statistics.fmean(cell.top1 for cell in self.cells if cell.corruption in names)


def quality_table(
    model: nn.Module,
    batches: Batches,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> QualityTable:
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
    return QualityTable(
        tuple(_cell(model, batches, name, severity, seed) for name, severity in track(pairs, label="corruptions of the images, cell"))
    )


def _cell(model: nn.Module, batches: Batches, name: str, severity: int, seed: int) -> Cell:
    dataset = batches.dataset if name == CLEAN else corrupted(batches.dataset, name, severity, seed=seed)
    with noting_spent(model) as noted:
        accuracy = evaluate(model, replace(batches, dataset=dataset))
    bits, bitops = _means(noted)
    return Cell(
        corruption=name, severity=severity, top1=accuracy.top1, loss=accuracy.loss, images=accuracy.images, bits=bits, bitops=bitops
    )


def _means(noted: Sequence[Spent]) -> tuple[float | None, float | None]:
    """Mean bits and BitOps over all images; None where none were noted."""
    if not noted:
        return None, None
    bits, bitops = (torch.cat(values).double().mean() for values in ([each.bits for each in noted], [each.bitops for each in noted]))
    return float(bits), float(bitops)


def _check_names(argument: str, names: Collection[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in names if name not in allowed]
    if unknown or not names or len(set(names)) < len(names):
        hint = nearest(str(unknown[0]), allowed) if unknown else ""
        raise BitscapeError(f"{argument} is {names!r}{hint}; allowed are one or more of {', '.join(allowed)}, each once")


def _check_severities(severities: Sequence[int]) -> None:
    whole = all(type(severity) is int and severity in SEVERITIES for severity in severities)
    if not whole or not severities or len(set(severities)) < len(severities):
        raise BitscapeError(f"severities is {severities!r}; allowed are one or more of the whole numbers 1 to 5, each once")
