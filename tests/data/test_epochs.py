from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from bitscape.data.epochs import Loaded, Rows, batches_in, epochs_of, first_of
from bitscape.data.reading import BatchReader
from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError

X, Y = torch.arange(10.0)[:, None], torch.arange(10)
READER = BatchReader.of(nn.Linear(1, 1))


def targets(data: Any, number: int = 0, start: int = 0) -> list[list[int]]:
    return [each.tolist() for _, each in data.epoch(number, start=start)]


def test_rows_are_shuffled_by_seed_and_epoch_and_can_be_entered_anywhere() -> None:
    data = epochs_of((X, Y), READER, batch_size=4, shuffle=True, seed=1)
    first, second = targets(data, 0), targets(data, 1)
    assert [len(batch) for batch in first] == [4, 4, 2] and len(data) == batches_in(data) == 3  # type: ignore[arg-type]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10)) and first != second
    assert targets(data, 1, start=1) == second[1:] and targets(data, 1, start=3) == []
    assert targets(epochs_of((X, Y), READER, batch_size=4, shuffle=True, seed=2)) != first
    assert targets(epochs_of((X, Y), READER, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_single_row_left_over_joins_the_batch_before_it() -> None:
    assert [len(batch) for batch in targets(epochs_of((X[:9], Y[:9]), READER, batch_size=4))] == [4, 5]


@pytest.mark.parametrize(
    "data", [TensorDataset(X, Y), {"input": X, "label": Y}, Samples.of(X, Y), [(X, Y)], DataLoader(TensorDataset(X, Y), batch_size=10)]
)
def test_data_of_every_form_hold_the_same_samples(data: Any) -> None:
    read = epochs_of(data, READER)
    for part in (first_of(read), *(Minibatch(*batch) for batch in read.epoch(0))):
        inputs = part.inputs["input"] if isinstance(part.inputs, dict) else part.inputs
        assert torch.equal(inputs, X) and torch.equal(part.targets, Y)


def test_an_array_is_a_tensor_and_samples_of_several_sizes_stay_apart() -> None:
    assert torch.equal(first_of(epochs_of(np.arange(4.0)[:, None], READER)).inputs, torch.arange(4.0, dtype=torch.float64)[:, None])
    both = Samples([Minibatch(torch.zeros(3, 2), Y[:3]), Minibatch(torch.zeros(2, 4), Y[3:5])])
    assert targets(epochs_of(both, READER, batch_size=2)) == [[0, 1, 2], [3, 4]]


def test_rows_of_an_iterable_dataset_are_put_into_batches() -> None:
    class Each(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(X, Y, strict=True)

    assert targets(epochs_of(Each(), READER, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_loader_shuffles_by_seed_and_epoch(generator: torch.Generator | None) -> None:
    def loaded(seed: int) -> Any:
        return epochs_of(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator), READER, seed=seed)

    torch.manual_seed(0)
    first = [targets(loaded(1), number) for number in (0, 1)]
    torch.manual_seed(7)
    again = loaded(1)
    assert first_of(again).targets.tolist() == first[0][0]
    assert [targets(again, number) for number in (0, 1)] == first and first[0] != first[1]
    assert targets(again, 1, start=2) == first[1][2:]
    assert targets(loaded(2)) != first[0]


def test_samplers_are_told_the_epoch() -> None:
    sampler = DistributedSampler(TensorDataset(X), num_replicas=1, rank=0)
    data = epochs_of(DataLoader(TensorDataset(X, Y), batch_size=5, sampler=sampler), READER)
    assert targets(data, 3) == targets(data, 3) != targets(data, 4) and sampler.epoch == 4


def test_a_generator_gives_its_batches_once_also_after_a_look_at_the_first() -> None:
    read = epochs_of(((X[i : i + 5], Y[i : i + 5]) for i in (0, 5)), READER)
    assert isinstance(read, Loaded) and read.once and batches_in(read) is None
    assert first_of(read).targets.tolist() == first_of(read).targets.tolist() == [0, 1, 2, 3, 4]
    assert targets(read) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for number in (0, 1):
        with pytest.raises(BitscapeError, match=f"data: epoch {number + 1} has no batch"):
            targets(read, number)


@pytest.mark.parametrize(
    ("data", "size", "said"),
    [
        ((X, Y[:3]), None, "data: its tensors have 3 and 10 rows"),
        ((X, torch.tensor(1.0)), None, "data: its tensors have 0 and 10 rows"),
        (X[:0], None, "it holds no batch"),
        ([], None, "it holds no batch"),
        ((X, Y), 2.0, "batch_size is 2.0; allowed are whole numbers from 1"),
        ([(X, Y)], 4, "batch_size is 4, and the data come in batches of their own"),
        ("images/", None, "data: str; .*a name or path is read by bitscape.load_dataset"),
        (3, None, "data: int; pass a tensor"),
    ],
)
def test_data_that_cannot_be_read_are_named(data: Any, size: Any, said: str) -> None:
    with pytest.raises(BitscapeError, match=said):
        first_of(epochs_of(data, READER, batch_size=size))


def test_rows_can_be_made_for_several_workers() -> None:
    from dataclasses import replace

    data = epochs_of((X, Y), READER, batch_size=4)
    assert isinstance(data, Rows)
    assert [len(batch) for batch in targets(replace(data, fewest=4))] == [4, 6]
