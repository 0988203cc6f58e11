"""Samples: the few hundred inputs, perhaps with targets, that a search, a calibration or a repair looks at."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitscape.calling import Inputs, map_tensors, moved, rows_of, sample_count, shapes_of
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_by_path, tensors_in
from bitscape.tables import Shown, Table, shortened
from bitscape.words import counted


@dataclass(frozen=True, eq=False)
class Minibatch:
    """Inputs that go through the network together, and their targets."""

    inputs: Inputs
    targets: Any = None
    """What a loss and a metric compare the outputs with; None without labels."""

    def __len__(self) -> int:
        return sample_count(self.inputs)

    def rows(self, rows: slice | Tensor) -> "Minibatch":
        """Return the picked samples."""
        samples = len(self)
        if isinstance(self.targets, list) and len(self.targets) == samples:  # one of whatever form for each sample
            targets: Any = [self.targets[row] for row in torch.arange(samples)[rows].tolist()]
        else:
            targets = rows_of(self.targets, rows, samples)
        return Minibatch(rows_of(self.inputs, rows, samples), targets)

    def to(self, device: torch.device) -> "Minibatch":
        """Return the same samples on `device`."""
        return Minibatch(moved(self.inputs, device), moved(self.targets, device))


class Samples(Shown):
    """Inputs held in memory, cut into batches of any size; samples of different shapes never share a batch."""

    def __init__(self, parts: Iterable[Minibatch]) -> None:
        self.parts = _joined([part for part in parts if len(part)])
        if not self.parts:
            raise BitscapeError("data: it holds no sample; give at least one, better a few hundred")

    @classmethod
    def of(cls, inputs: Inputs, targets: Any = None) -> "Samples":
        """Return the samples of one batch."""
        return cls([Minibatch(inputs, targets)])

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batches(self, size: int) -> Iterator[Minibatch]:
        """Yield all samples in order, at most `size` together; a single sample left over joins the batch before it."""
        for part in self.parts:
            bounds = list(range(0, len(part), size))
            if len(bounds) > 1 and len(part) - bounds[-1] == 1:
                bounds.pop()  # a norm over one value cannot train
            for first, end in zip(bounds, [*bounds[1:], len(part)], strict=True):
                yield part.rows(slice(first, end))

    def first(self, count: int) -> "Samples":
        """Return the first `count` samples, all if there are fewer."""
        parts, left = [], count
        for part in self.parts:
            parts.append(part.rows(slice(0, max(left, 0))))
            left -= len(part)
        return Samples(parts)

    def after(self, count: int) -> "Samples":
        """Return the samples behind the first `count`. Raises BitscapeError if there are none."""
        parts, skipped = [], count
        for part in self.parts:
            parts.append(part.rows(slice(min(skipped, len(part)), None)))
            skipped = max(skipped - len(part), 0)
        return Samples(parts)

    def to(self, device: torch.device) -> "Samples":
        """Return the same samples on `device`."""
        return Samples(part.to(device) for part in self.parts)

    def table(self) -> Table:
        """Return the tensors of the first and last parts: samples of one shape."""
        rows = [_described(part, path, tensor) for part in self.parts for path, tensor in tensors_by_path(part)]
        title = f"Samples: {counted(len(self), 'sample')}{'' if self.labelled else ', no targets'}"
        return Table(title=title, columns=("samples", "tensor", "shape of one", "type"), rows=shortened(rows), left=4)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a target."""
        return all(part.targets is not None for part in self.parts)

    @property
    def example(self) -> Inputs:
        """The inputs of the first sample, as a batch of one."""
        return self.parts[0].rows(slice(0, 1)).inputs

    @property
    def shapes(self) -> list[list[int]]:
        """Shape of every input tensor of the first sample, without the batch dimension."""
        return [shape[1:] for shape in shapes_of(self.example)]


def _described(part: Minibatch, path: Iterable[object], tensor: Tensor) -> tuple[str, ...]:
    shape = "x".join(map(str, tensor.shape[1:]))
    return str(len(part)), ".".join(map(str, path)), shape, str(tensor.dtype).removeprefix("torch.")


def _joined(parts: list[Minibatch]) -> list[Minibatch]:
    """Join neighbours whose tensors are alike but for their first size."""
    groups: list[list[Minibatch]] = []
    for part in parts:
        if groups and _form(groups[-1][0]) == _form(part):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def _form(part: Minibatch) -> tuple[Any, ...]:
    """Structure, types and sizes of one sample; a part with a tensor of every sample is like no other."""
    samples = len(part)
    tensors = list(tensors_in([part.inputs, part.targets]))
    if not all(tensor.ndim and len(tensor) == samples for tensor in tensors):
        return (id(part),)
    return (_structure([part.inputs, part.targets]), *((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors))


def _structure(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return Tensor
    if isinstance(tree, Mapping):
        return tuple((key, _structure(value)) for key, value in tree.items())
    if isinstance(tree, tuple | list):
        return (type(tree), *(_structure(value) for value in tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return (type(tree), _structure(vars(tree)))
    return (type(tree), repr(tree))


def _concatenated(group: list[Minibatch]) -> Minibatch:
    def joined(trees: list[Any]) -> Any:
        columns = zip(*map(tensors_in, trees), strict=True)
        return map_tensors(lambda _: torch.cat(next(columns)), trees[0])

    return Minibatch(joined([part.inputs for part in group]), joined([part.targets for part in group]))
