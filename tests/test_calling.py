from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bitscape.calling import call, first_rows, map_tensors, rows_of, sample_count
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_in


class Sum(nn.Module):
    def forward(self, a, b=0.0, *, scale=1.0):
        return (a + b) * scale


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (torch.tensor([1.0]), 1.0),
        ((torch.tensor([1.0]), 2.0), 3.0),
        ({"a": torch.tensor([1.0]), "scale": 4.0}, 4.0),
    ],
)
def test_a_network_is_called_with_one_tensor_several_or_keywords(inputs, output):
    assert call(Sum(), inputs).item() == output


def test_tensors_are_mapped_wherever_they_lie():
    tree = {"a": torch.ones(2), "b": (torch.ones(1), [3, "x"])}
    doubled = map_tensors(lambda t: 2 * t, tree)
    assert [t.tolist() for t in tensors_in(doubled)] == [[2.0, 2.0], [2.0]]
    assert doubled["b"][1] == [3, "x"]


def test_rows_are_cut_where_the_first_size_counts_samples():
    tree = (torch.arange(4), torch.arange(3), torch.tensor(5))
    cut = rows_of(tree, slice(1, 3), 4)
    assert [t.tolist() for t in cut] == [[1, 2], [0, 1, 2], 5]


def test_samples_are_counted_by_the_first_tensor_with_a_size():
    assert sample_count({"scale": torch.tensor(2.0), "x": torch.zeros(7, 2)}) == 7
    with pytest.raises(BitscapeError, match="no tensor with a batch dimension in a tuple"):
        sample_count((1, torch.tensor(2.0)))


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


@dataclass
class State:
    hidden: torch.Tensor
    step: int = 0


def test_named_tuples_and_dataclasses_stay_what_they_are() -> None:
    tree = Pair(torch.ones(2), 3), State(torch.ones(2), 4)
    pair, state = map_tensors(lambda tensor: tensor * 2, tree)
    assert isinstance(pair, Pair) and isinstance(state, State)
    assert (pair.left.tolist(), pair.right) == ([2.0, 2.0], 3)
    assert (state.hidden.tolist(), state.step) == ([2.0, 2.0], 4)


def test_the_first_rows_of_every_tensor_of_the_samples() -> None:
    image, scale = first_rows((torch.arange(6).reshape(3, 2), torch.ones(5)), 2)
    assert image.tolist() == [[0, 1], [2, 3]] and scale.shape == (5,)
