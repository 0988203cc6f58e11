import pytest
import torch

from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError
from bitscape.verbs.proxy import parted


def firsts(samples: Samples) -> list[float]:
    return [value for part in samples.parts for value in part.inputs.flatten(1)[:, 0].tolist()]


def test_one_of_every_four_samples_is_held_out_over_shapes_and_batches() -> None:
    rows = torch.arange(10.0)
    small, large = rows[:3].view(3, 1), rows[3:].view(7, 1).expand(7, 2)
    samples = Samples([Minibatch(small), Minibatch(large)])
    others, held_out = parted(samples)
    assert [int(row) // 4 for row in firsts(held_out)] == [0, 1]
    assert firsts(others) == [row for row in rows.tolist() if row not in firsts(held_out)]
    assert firsts(parted(samples)[1]) == firsts(held_out)


@pytest.mark.parametrize("classes", [2, 4, 8, 10])
@pytest.mark.parametrize("turns", [True, False])
def test_all_classes_are_on_both_sides_of_data_in_turns_and_of_sorted_data(classes: int, turns: bool) -> None:
    labels = torch.arange(240.0) % classes
    parts = parted(Samples.of((labels if turns else labels.sort().values).view(240, 1)))
    assert [len(part) for part in parts] == [180, 60]
    assert all(set(firsts(part)) == set(range(classes)) for part in parts)


def test_fewer_than_four_are_refused() -> None:
    with pytest.raises(BitscapeError, match="data: 3 samples; give at least 4"):
        parted(Samples.of(torch.zeros(3, 1)))
