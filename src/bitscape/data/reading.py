"""Data as users have it: tensors, iterables of batches, DataLoaders, torch and Hugging Face datasets.

A batch is whatever the loader gives. Two functions say how to read it, both with defaults:

    inputs(batch)  -> what the network is called with: a tensor, a tuple of arguments, or a mapping of keywords
    targets(batch) -> what a loss and a metric compare the outputs with, or None
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from bitscape.calling import Inputs, arguments_of, sample_count
from bitscape.data.batches import Batches
from bitscape.data.proxy import draw_proxy
from bitscape.data.samples import Minibatch, Samples
from bitscape.data.sources import Dataset
from bitscape.data.streams import RandomStream, own_generators
from bitscape.errors import BitscapeError, at_least_one, first_line
from bitscape.nested import tensors_in

LABELS = ("label", "labels", "target", "targets", "y")
"""Entries of a mapping that are targets."""
LOADED_TOGETHER = 64
"""Rows of a dataset that are collated at once."""


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """How a batch of the user's is read."""

    inputs: Callable[[Any], Inputs]
    targets: Callable[[Any], Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Callable[[Any], Inputs] | None = None,
        targets: Callable[[Any], Any] | None = None,
    ) -> "BatchReader":
        """Return the user's functions, with defaults in place of None.

        By default the inputs are the tensor itself, the first entry of a pair, or of a mapping the entries that the
        model's forward takes by name (its one tensor that is no label where it takes none); the targets are the second
        entry of a pair, or the entry of a mapping that is called label, labels, target, targets or y.
        """
        forward = inspect.signature(model.forward)
        if inputs is None:
            return cls(
                inputs=lambda batch: _default_inputs(batch, forward),
                targets=targets or _default_targets,
            )
        users_inputs = inputs

        def checked(batch: Any) -> Inputs:
            taken = users_inputs(batch)
            if problem := _unfitting(taken, forward):
                raise BitscapeError(
                    f"inputs: the function returns a {type(taken).__name__}, and {problem}; "
                    "return a tensor, a tuple of arguments or a mapping of keywords"
                )
            return taken

        return cls(inputs=checked, targets=targets or _default_targets)

    def read(self, batch: Any) -> Minibatch:
        """Return the batch as inputs and targets. Raises BitscapeError for inputs without a tensor."""
        minibatch = Minibatch(self.inputs(batch), self.targets(batch))
        sample_count(minibatch.inputs)
        return minibatch


def read_samples(data: Any, reader: BatchReader, *, count: int, seed: int = 0) -> Samples:
    """Return up to `count` samples of `data`, held in memory.

    Args:
        data: a tensor, or a tuple or mapping of tensors (one large batch); a torch or Hugging Face dataset, or `Batches`
            (all drawn from by `seed`, and kept in the order of the draw; of a dataset that can only be iterated, the
            first samples); or an iterable of batches, such as a DataLoader (its first samples).
        reader: how a batch is read.
        count: most samples that are kept.
        seed: of the draw, and of what loaders and datasets draw from Python, numpy, torch or a generator of their own;
            the global random states are the caller's again afterwards.

    Raises:
        BitscapeError: no samples, a batch that cannot be read, or data of another kind.
    """
    at_least_one(count=count)
    if isinstance(data, Samples):
        return data.first(count)
    minibatches = (reader.read(batch) for batch in _batches(data, count, seed))
    with own_generators(data, seed):
        return Samples(_until(count, RandomStream(seed).through(minibatches)))


def _batches(data: Any, count: int, seed: int) -> Iterator[Any]:
    if isinstance(data, Batches):
        drawn = draw_proxy(data.dataset, images=min(count, len(data.dataset)), seed=seed)
        yield (data.normalization.apply(drawn.images), drawn.labels)
    elif isinstance(data, np.ndarray):
        yield from _batches(torch.from_numpy(data), count, seed)
    elif isinstance(data, IterableDataset):  # its rows, one by one
        yield from DataLoader(data, batch_size=LOADED_TOGETHER)
    elif is_one_batch(data):
        yield Minibatch(data).rows(_drawn(sample_count(data), count, seed)).inputs
    elif is_map_dataset(data):
        rows = _drawn(len(data), count, seed).tolist()
        for start in range(0, len(rows), LOADED_TOGETHER):
            yield collated([data[row] for row in rows[start : start + LOADED_TOGETHER]])
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        yield from data
    else:
        raise unreadable(data)


def unreadable(data: Any) -> BitscapeError:
    """Return what to say of data of no kind that can be read."""
    if isinstance(data, Dataset):
        return BitscapeError(
            f"data: the images of {data.name} are uint8 and not normalized; pass Batches(dataset=..., normalization=...)"
        )
    kind = f"the class {data.__name__}" if isinstance(data, type) else type(data).__name__
    named = "; a name or path is read by bitscape.load_dataset" if isinstance(data, str) else ""
    return BitscapeError(f"data: {kind}; pass a tensor, an iterable of batches, a torch Dataset or a DataLoader{named}")


def is_one_batch(data: Any) -> bool:
    """Whether `data` is one large batch: a tensor, or a tuple or mapping of tensors only."""
    if isinstance(data, tuple | Mapping):
        entries = list(data.values()) if isinstance(data, Mapping) else list(data)
        return bool(entries) and all(isinstance(entry, Tensor) for entry in entries)
    return isinstance(data, Tensor)


def is_map_dataset(data: Any) -> bool:
    """Whether `data` has rows to pick: a torch Dataset or a Hugging Face dataset, but no list of batches and no loader."""
    return (
        isinstance(data, Sized)
        and hasattr(data, "__getitem__")
        and not isinstance(data, list | tuple | Mapping | str | bytes | Tensor | DataLoader)
    )


def collated(rows: list[Any]) -> Any:
    """Return rows of a dataset as one batch."""
    try:
        return default_collate(rows)
    except (TypeError, RuntimeError) as error:
        raise BitscapeError(
            f"data: its rows do not stack into a batch ({first_line(error)}); let the dataset return tensors of one size, "
            "or pass a DataLoader with a collate_fn"
        ) from error


def _until(count: int, batches: Iterator[Minibatch]) -> Iterator[Minibatch]:
    left = count
    for batch in batches:
        yield batch.rows(slice(0, left)) if len(batch) > left else batch
        left -= len(batch)
        if left <= 0:  # asked before the next batch is loaded
            return


def _drawn(rows: int, count: int, seed: int) -> Tensor:
    """In the order of the draw: of data sorted by class the first few rows hold one class alone."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]


def _unfitting(inputs: Inputs, forward: inspect.Signature) -> str:
    """Say why the forward of a network cannot be called with these inputs; "" where it can."""
    arguments, keywords = arguments_of(inputs)
    try:
        forward.bind(*arguments, **keywords)
    except TypeError as error:
        names = ", ".join(forward.parameters)
        return f"the network cannot be called with it: forward({names}) ({first_line(error)})"
    return ""


def _default_inputs(batch: Any, forward: inspect.Signature) -> Inputs:
    if isinstance(batch, tuple | list) and len(batch) not in (1, 2):
        raise BitscapeError(
            f"data: a batch is a {type(batch).__name__} of {len(batch)} entries, of which any may be an input; "
            "pass inputs= and targets=, functions from a batch to what the network is called with and to the labels"
        )
    is_pair = isinstance(batch, tuple | list)
    taken = _of_mapping(batch, forward) if isinstance(batch, Mapping) else batch[0] if is_pair else batch
    if problem := _unfitting(taken, forward):
        what, example = f"a batch is a {type(batch).__name__}", ""
        if is_pair:
            what = "of a pair, the first entry is the input and the second the label"
            example = ", e.g. inputs=tuple where both entries are inputs"
        raise BitscapeError(
            f"data: {what}, and {problem}; pass inputs=, a function from a batch to a tensor, a "
            f"tuple of arguments or a mapping of keywords{example}"
        )
    return taken


def _of_mapping(batch: Mapping[str, Any], forward: inspect.Signature) -> Inputs:
    parameters = forward.parameters.values()
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unlabelled = {key: value for key, value in batch.items() if key not in LABELS and next(tensors_in(value), None) is not None}
    named = {key: value for key, value in unlabelled.items() if key in keywords}
    if named:
        return named
    if len(unlabelled) == 1:
        return next(iter(unlabelled.values()))
    raise BitscapeError(
        f"data: a batch has the entries {', '.join(map(repr, batch))}, and the network's forward takes "
        f"{', '.join(sorted(keywords)) or 'none by name'}; pass inputs=, a function from a batch to what the network is called with"
    )


def _default_targets(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
