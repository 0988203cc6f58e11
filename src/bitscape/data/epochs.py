"""The user's data, epoch after epoch: for one seed the same batches in the same order, from any
batch on.

a dataset, or one large batch   its rows are shuffled and cut here; a batch depends on (seed, epoch, batch)
an iterable or a loader         iterated once an epoch; what it draws depends on (seed, epoch)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bitscape.calling import Inputs, sample_count
from bitscape.data.cuts import Cuts
from bitscape.data.reading import BatchReader, collated, is_map_dataset, is_one_batch, unreadable
from bitscape.data.samples import Minibatch, Samples
from bitscape.data.streams import RandomStream, generators_of, seed_of
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_in

BATCH_SIZE = 128
"""Samples of a batch, for data without batches."""
AS_READ = BatchReader(inputs=attrgetter("inputs"), targets=attrgetter("targets"))
"""Of data that are read already: a `Minibatch`."""


class Epochs(Protocol):
    """Batches, epoch after epoch; `len` is the number of batches in one, where that is known."""

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Inputs, Any]]:
        """Yield the inputs and targets of each batch of epoch `number`, from batch `start` on, both
        from 0.
        """
        ...


def batches_in(data: Epochs) -> int | None:
    """Return how many batches an epoch has, or None for data that do not tell."""
    try:
        return len(data)  # type: ignore[arg-type]  # what has no length says so
    except TypeError:
        return None


def first_of(data: Epochs) -> Minibatch:
    """Return the first batch of the first epoch. Raises BitscapeError if there is none."""
    if isinstance(data, Loaded):
        return data.first
    for inputs, targets in data.epoch(0):
        return Minibatch(inputs, targets)
    raise _nothing()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A dataset, or one large batch, in batches.

    Raises BitscapeError for tensors of different lengths, or none.
    """

    data: Any
    """A torch or Hugging Face dataset; a tensor, or a tuple or mapping of tensors; or a
    `Minibatch`.
    """
    reader: BatchReader
    batch_size: int = BATCH_SIZE
    """Samples in a batch; the last one of an epoch may be smaller, or larger where what remains has
    joined it.
    """
    shuffle: bool = True
    """Another order in every epoch."""
    seed: int = 0
    """Of the order, and of what the dataset draws."""
    fewest: int = 2
    """A last batch of fewer samples joins the one before it."""

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise BitscapeError(
                f"batch_size is {self.batch_size!r}; allowed are whole numbers from 1"
            )
        if is_one_batch(self.data):
            lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors_in(self.data)}
            if len(lengths) > 1:
                raise BitscapeError(
                    f"data: its tensors have {' and '.join(map(str, sorted(lengths)))} rows; give "
                    "all of them a row for each sample"
                )
        if not self._count:
            raise _nothing()

    @property
    def _count(self) -> int:
        return sample_count(self.data) if is_one_batch(self.data) else len(self.data)

    @property
    def cuts(self) -> Cuts:
        """The rows of each batch, in the order of an epoch."""
        return Cuts(self._count, self.batch_size, self.fewest)

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.cuts)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Inputs, Any]]:
        """See `Epochs`."""
        order = self._order(number)
        for batch, cut in enumerate(self.cuts[start:], start):
            with RandomStream(self.seed, number, batch).drawing():
                part = self.reader.read(self._picked(order[cut.start : cut.stop]))
            yield part.inputs, part.targets

    def _order(self, number: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self._count)
        return torch.randperm(
            self._count,
            generator=torch.Generator().manual_seed(seed_of(self.seed, number, "order")),
        )

    def _picked(self, rows: Tensor) -> Any:
        if isinstance(self.data, Minibatch):
            return self.data.rows(rows)
        if is_one_batch(self.data):
            return Minibatch(self.data).rows(rows).inputs
        picked = rows.tolist()
        together: Callable[[list[int]], list[Any]] | None = getattr(self.data, "__getitems__", None)
        return collated(
            [self.data[row] for row in picked] if together is None else list(together(picked))
        )


class Loaded:
    """An iterable of batches, iterated once in every epoch."""

    def __init__(self, data: Iterable[Any], reader: BatchReader, seed: int = 0) -> None:
        self.data, self.reader, self.seed = data, reader, seed
        self._rest: Iterator[Minibatch] | None = None

    def __len__(self) -> int:
        """Batches of one epoch. Raises TypeError where the data do not tell."""
        return len(self.data)  # type: ignore[arg-type]  # what has no length says so

    @property
    def once(self) -> bool:
        """Whether the data, such as a generator, give their batches a single time."""
        return isinstance(self.data, Iterator)

    @cached_property
    def first(self) -> Minibatch:
        """The first batch of the first epoch; of a generator it is kept for that epoch."""
        batches = self._iterated(0)
        part = next(batches, None)
        if part is None:
            raise _nothing()
        if self.once:
            self._rest = batches
        return part

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Inputs, Any]]:
        """See `Epochs`; batches before `start` are loaded and left out. Raises BitscapeError for an
        epoch without a batch.
        """
        empty = True
        for part in islice(
            self._once(number) if self.once else self._iterated(number), start, None
        ):
            empty = False
            yield part.inputs, part.targets
        if empty and not start:
            raise BitscapeError(
                f"data: epoch {number + 1} has no batch, the data gave theirs in an epoch before; "
                "pass what starts anew at each iteration, such as a list or a DataLoader"
            )

    def _once(self, number: int) -> Iterator[Minibatch]:
        first, rest = self.first, self._rest
        if rest is None or number:
            return
        self._rest = None
        yield first
        yield from rest

    def _iterated(self, number: int) -> Iterator[Minibatch]:
        self._begin(number)
        return RandomStream(self.seed, number).through(self._read())

    def _read(self) -> Iterator[Minibatch]:
        for batch in self.data:
            yield self.reader.read(batch)

    def _begin(self, number: int) -> None:
        """Tell samplers and datasets the epoch; a generator of the loader's own is seeded, since a
        resumed run has a new one.
        """
        for part in (
            self.data,
            *(getattr(self.data, name, None) for name in ("sampler", "batch_sampler", "dataset")),
        ):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(number)
        for generator in generators_of(self.data):
            generator.manual_seed(seed_of(self.seed, number, "loader"))


def epochs_of(
    data: Any,
    reader: BatchReader,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Epochs:
    """Return `data` as epochs of batches.

    Args:
        data: as `read_samples` takes it; or anything with `epoch(number, start=)`, such as
            `Batches`, which stays as it is.
        reader: how a batch is read.
        batch_size: samples of a batch, for data without batches; None = 128.
        shuffle: another order in each epoch, for data without batches.
        seed: of the order, and of what loaders and datasets draw.

    Raises:
        BitscapeError: data of another kind, without a sample, or with batches of their own and a
            `batch_size`.
    """
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    elif isinstance(data, Samples):
        reader = AS_READ
        if len(data.parts) > 1:
            return Loaded(list(data.batches(batch_size or BATCH_SIZE)), reader, seed)
        data = data.parts[0]
    elif isinstance(data, IterableDataset):
        return Loaded(DataLoader(data, batch_size=batch_size or BATCH_SIZE), reader, seed)
    if callable(getattr(data, "epoch", None)) and not isinstance(data, type):
        batches: Epochs = data
        return _in_batches(batches, batch_size)
    if isinstance(data, Minibatch) or is_one_batch(data) or is_map_dataset(data):
        size = BATCH_SIZE if batch_size is None else batch_size
        return Rows(data=data, reader=reader, batch_size=size, shuffle=shuffle, seed=seed)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping):
        raise unreadable(data)
    return _in_batches(Loaded(data, reader, seed), batch_size)


def _in_batches(data: Epochs, batch_size: int | None) -> Epochs:
    if batch_size is not None:
        raise BitscapeError(
            f"batch_size is {batch_size}, and the data come in batches of their own; set their "
            "size there"
        )
    return data


def _nothing() -> BitscapeError:
    return BitscapeError(
        "data: it holds no batch; give at least one sample, and no drop_last where there are few"
    )
