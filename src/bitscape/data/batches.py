"""Batches: normalized images in an order, and with an augmentation, that depend only on (seed, epoch, batch)."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from bitscape.data.cuts import Cuts
from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError, nearest
from bitscape.signatures import check_fields
from bitscape.tables import Shown, Table

Augmentation = Literal["none", "flip", "crop-flip"]
CROP_PAD = 4
ALL = slice(None)


@dataclass(frozen=True)
class Normalization:
    """Per channel (x / 255 - mean) / std. Raises BitscapeError unless both have the same length and std is positive."""

    mean: tuple[float, ...]
    """Mean of each channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, on the same scale."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.mean or len(self.mean) != len(self.std):
            raise BitscapeError(f"mean {self.mean} and std {self.std} must hold one value for each channel")
        if not all(math.isfinite(value) for value in self.mean) or not all(0 < value < math.inf for value in self.std):
            raise BitscapeError(f"mean {self.mean} must be finite, std {self.std} positive and finite")

    def apply(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Normalize uint8 images to float32. Raises BitscapeError for another type or number of channels."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise BitscapeError(f"images are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 (n, c, h, w)")
        self.check_channels(images.shape[1])
        factor = torch.tensor([1 / (255 * std) for std in self.std], device=images.device).view(-1, 1, 1)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)], device=images.device)
        return torch.mul(images, factor).sub_(shift.view(-1, 1, 1))

    def check_channels(self, channels: int) -> None:
        """Raise BitscapeError unless images with that many channels can be normalized."""
        if channels != len(self.mean):
            raise BitscapeError(
                f"the images have {channels} channels, the normalization has {len(self.mean)} (mean {self.mean}); "
                "choose a normalization with as many"
            )


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
UNIT = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # 0..1
DIGITS = Normalization((0.0,), (1.0,))  # 0..1, one channel


@dataclass(frozen=True, kw_only=True, repr=False)
class Batches(Shown):
    """Batches of a dataset, epoch after epoch.

    Batch i of epoch e is a function of (seed, e, i) alone, so training resumes in the middle of an epoch for free.
    Raises BitscapeError for settings that fit neither each other nor the dataset.
    """

    dataset: Dataset
    """Images and labels."""
    normalization: Normalization
    """As many channels as the images."""
    batch_size: int = 128
    """Images in a batch; the last one of an epoch may be smaller, or larger where what remains has joined it."""
    shuffle: bool = False
    """Another order in every epoch; otherwise the order of the dataset."""
    augment: Augmentation = "none"
    """flip: mirrored left-right with probability 1/2. crop-flip: also shifted by up to 4 pixels; zeros come in."""
    seed: int = 0
    """Of the order and the augmentation."""
    drop_last: bool = False
    """Leave out a smaller last batch."""
    fewest: int = 2
    """A last batch of fewer images joins the one before it: norms find no variance in a single image with maps of one pixel."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.normalization.check_channels(self.dataset.images.shape[1])
        allowed = get_args(Augmentation)
        if self.augment not in allowed:
            hint = nearest(str(self.augment), allowed)
            raise BitscapeError(f"augment is {self.augment!r}; allowed are {', '.join(allowed)}{hint}")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise BitscapeError(f"batch_size is {self.batch_size!r}; allowed are whole numbers from 1")
        if not len(self):
            raise BitscapeError(
                f"batch_size={self.batch_size} with drop_last leaves no batch of the {len(self.dataset)} images; "
                "lower batch_size or keep the last batch"
            )

    def table(self) -> Table:
        """Return the data set and the settings."""
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dataset"}
        rows = [(name, str(value)) for name, value in shown.items()]
        title = f"Batches: {len(self)} an epoch of {self.dataset.table().title}"
        return Table(title=title, columns=("setting", "value"), rows=rows, left=2)

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.cuts)

    @property
    def cuts(self) -> Cuts:
        """The rows of each batch in the order of an epoch."""
        images = len(self.dataset)
        return Cuts(images - images % self.batch_size if self.drop_last else images, self.batch_size, self.fewest)

    def epoch(
        self, number: int, *, start: int = 0, rows: slice = ALL
    ) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"] | None]]:
        """Yield (images, labels) of epoch `number` from batch `start`, both from 0; start = len(self) yields none.

        rows: the images of each batch to make, all by default; they are the same bits as in the whole batch.
        Raises BitscapeError for numbers out of range, at the call, not at the first batch.
        """
        if number < 0 or not 0 <= start <= len(self):
            raise BitscapeError(f"epoch is {number}, start is {start}; allowed are epochs from 0, starts 0 to {len(self)}")
        return self._batches(number, start, rows)

    def _batches(self, number: int, start: int, rows: slice) -> Iterator[tuple[Tensor, Tensor | None]]:
        order, labels = self._order(number), self.dataset.labels
        for batch, whole in enumerate(self.cuts[start:], start):
            part = whole[rows]
            picked = slice(part.start, part.stop, part.step)
            index = picked if order is None else order[picked]
            images = self._normalized(self.dataset.images[index], _generator(self.seed, number, batch), len(whole), rows)
            yield images, None if labels is None else labels[index]

    def _order(self, number: int) -> Int64[Tensor, " n"] | None:
        if not self.shuffle:
            return None
        return torch.randperm(len(self.dataset), generator=_generator(self.seed, number, "order"))

    def _normalized(self, images: Tensor, generator: torch.Generator, whole: int, rows: slice) -> Float[Tensor, "n c h w"]:
        """Augment and normalize `images`, the `rows` of a batch of `whole`; random numbers are drawn for the whole batch."""
        if self.augment == "none":
            return self.normalization.apply(images)
        mirrored = torch.rand(whole, generator=generator)[rows] < 0.5
        normalized = self.normalization.apply(_flipped(images, mirrored))
        if self.augment == "flip":
            return normalized
        return _shifted(normalized, torch.randint(2 * CROP_PAD + 1, (2, whole), generator=generator)[:, rows])


def _generator(seed: int, epoch: int, part: int | str) -> torch.Generator:
    # Hashed to the 32 bits that the CPU generator takes: sums of seed and epoch would repeat streams.
    digest = hashlib.sha256(f"{seed}/{epoch}/{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _flipped(images: UInt8[Tensor, "n c h w"], mirrored: Bool[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
    """Mirror the chosen images left-right."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def _shifted(images: Float[Tensor, "n c h w"], corners: Int64[Tensor, "2 n"]) -> Float[Tensor, "n c h w"]:
    """Move each image by -4..4 pixels down and right; zeros, which are the mean color, come in."""
    top, left = corners
    height, width = images.shape[2:]
    # windows[i, t, l] is image i cut at corner (t, l): a view, so that one indexing copies whole rows
    windows = pad(images, (CROP_PAD,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    return windows[torch.arange(len(images)), top, left]
