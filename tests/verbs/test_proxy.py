import pytest
import torch

from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError
from bitscape.verbs.proxy import parted


def firsts(samples: Samples) -> list[float]:
    return [value for part in samples.parts for value in part.inputs.flatten(1)[:, 0].tolist()]


def test_every_fourth_sample_is_held_out_over_shapes_and_batches() -> None:
    rows = torch.arange(10.0)
    small, large = rows[:3].view(3, 1), rows[3:].view(7, 1).expand(7, 2)
    others, held_out = parted(Samples([Minibatch(small), Minibatch(large)]))
    assert firsts(held_out) == [3.0, 7.0]
    assert firsts(others) == [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0, 9.0]


def test_fewer_than_four_are_refused() -> None:
    with pytest.raises(BitscapeError, match="data: 3 samples; give at least 4"):
        parted(Samples.of(torch.zeros(3, 1)))
