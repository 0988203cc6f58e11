import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bitscape.data.batches import Batches, Normalization
from bitscape.data.reading import BatchReader, read_samples
from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError

X, Y = torch.arange(10.0).view(10, 1), torch.arange(10) % 3


class Pixels(nn.Module):
    def forward(self, pixel_values, mask=None):
        return pixel_values


class Rows:
    """Rows as Hugging Face datasets give them: mappings, picked by number."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {"pixel_values": X[row], "id": f"image {row}", "label": int(Y[row])}


READER = BatchReader.of(nn.Identity())


def values(samples):
    return [value for part in samples.parts for value in part.inputs.flatten().tolist()]


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.numpy(),
        [X[:4], X[4:]],
        TensorDataset(X),
        DataLoader(TensorDataset(X), batch_size=3),
        (batch for batch in X.split(3)),
    ],
    ids=["tensor", "array", "list", "dataset", "loader", "generator"],
)
def test_inputs_alone_are_read(data):
    samples = read_samples(data, READER, count=100)
    assert sorted(values(samples)) == list(range(10))
    assert not samples.labelled


@pytest.mark.parametrize(
    "data",
    [(X, Y), [(X[:4], Y[:4]), (X[4:], Y[4:])], TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=3), {"x": X, "y": Y}],
    ids=["tuple", "pairs", "dataset", "loader", "mapping"],
)
def test_targets_are_the_second_entry_or_the_label(data):
    samples = read_samples(data, READER, count=100)
    assert sorted(values(samples)) == list(range(10))
    labels = torch.cat([part.targets for part in samples.parts]).tolist()
    assert labels == [value % 3 for value in values(samples)]


def test_a_mapping_is_read_by_the_names_that_the_forward_takes():
    samples = read_samples(Rows(), BatchReader.of(Pixels()), count=100)
    assert list(samples.parts[0].inputs) == ["pixel_values"]
    assert samples.parts[0].targets.tolist() == [value % 3 for value in samples.parts[0].inputs["pixel_values"].flatten().tolist()]


def test_functions_of_the_user_read_any_batch():
    data = [{"left": X, "deep": {"right": 2 * X}, "truth": {"boxes": Y}}]
    reader = BatchReader.of(
        nn.Bilinear(1, 1, 1),
        inputs=lambda b: (b["left"], b["deep"]["right"]),
        targets=lambda b: b["truth"],
    )
    part = read_samples(data, reader, count=4).parts[0]
    assert part.inputs[1].flatten().tolist() == [0.0, 2.0, 4.0, 6.0]
    assert part.targets["boxes"].tolist() == [0, 1, 2, 0]


def test_a_dataset_is_drawn_from_by_the_seed_and_a_loader_from_its_start():
    drawn = values(read_samples(TensorDataset(X), READER, count=4, seed=1))
    assert drawn == values(read_samples(X, READER, count=4, seed=1)) != sorted(drawn)
    assert drawn != values(read_samples(X, READER, count=4, seed=2))
    assert values(read_samples(DataLoader(TensorDataset(X), batch_size=3), READER, count=4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [24, 100])
@pytest.mark.parametrize("made", [tuple, lambda pair: TensorDataset(*pair)], ids=["tensors", "dataset"])
def test_the_first_few_of_data_sorted_by_class_are_of_all_classes(made, count):
    labels = torch.arange(3).repeat_interleave(20)
    samples = read_samples(made((labels.view(60, 1).float(), labels)), READER, count=count)
    assert len(samples) == min(count, 60)
    assert set(values(samples.first(12))) == {0.0, 1.0, 2.0}


def drawing():
    for _ in range(3):
        yield torch.rand(2, 1) + float(np.random.rand()) + random.random()


class Drawing:
    def __len__(self):
        return 5

    def __getitem__(self, row):
        return torch.rand(1) + float(np.random.rand()) + random.random()


def loader_with_its_own_generator():
    rows = TensorDataset(torch.arange(50.0).view(50, 1))
    return DataLoader(rows, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "data",
    [
        drawing,
        Drawing,
        lambda: DataLoader(Drawing(), batch_size=2),
        lambda: DataLoader(TensorDataset(torch.arange(50.0).view(50, 1)), batch_size=5, shuffle=True),
        loader_with_its_own_generator,
    ],
    ids=["generator", "dataset", "loader", "shuffled", "generator of its own"],
)
def test_what_data_draw_depends_on_the_seed_and_moves_no_state_of_the_callers(data):
    pass_over, states = data(), []
    own = getattr(pass_over, "generator", None)
    before = None if own is None else own.get_state()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = (float(torch.rand(())), float(np.random.rand()), random.random())
    for _ in range(2):
        torch.manual_seed(7), np.random.seed(7), random.seed(7)
        first = values(read_samples(data() if own is None else pass_over, READER, count=5, seed=3))
        states.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        again = values(read_samples(data() if own is None else pass_over, READER, count=5, seed=3))
        assert first == again != values(read_samples(data(), READER, count=5, seed=4))
    assert states == [expected, expected]
    assert own is None or own.get_state().equal(before)


def test_no_batch_behind_the_last_sample_is_loaded():
    def batches():
        yield X[:4]
        raise AssertionError("asked for a batch too many")

    assert len(read_samples(batches(), READER, count=4)) == 4


def test_rows_that_can_only_be_iterated_are_put_together():
    class Each(IterableDataset):
        def __iter__(self):
            yield from zip(X, Y, strict=True)

    samples = read_samples(Each(), READER, count=4)
    assert values(samples) == [0.0, 1.0, 2.0, 3.0] and samples.parts[0].targets.tolist() == [0, 1, 2, 0]


def test_batches_are_drawn_and_normalized():
    images = torch.full((6, 1, 2, 2), 255, dtype=torch.uint8)
    dataset = Dataset("made", images, torch.tensor([0, 1, 0, 1, 0, 1]), ("a", "b"))
    samples = read_samples(Batches(dataset=dataset, normalization=Normalization((0.5,), (0.25,))), READER, count=4)
    assert set(values(samples)) == {2.0}
    assert sorted(samples.parts[0].targets.tolist()) == [0, 0, 1, 1]
    with pytest.raises(BitscapeError, match="made are uint8 and not normalized"):
        read_samples(dataset, READER, count=4)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "it holds no sample"),
        ("photos/", "a name or path is read by bitscape.load_dataset"),
        (3, "data: int"),
        ([(X, X, Y)], "a batch is a tuple of 3 entries"),
        ([{"left": X, "right": X}], "the entries 'left', 'right'"),
        ([["a", "b"]], "no tensor with a batch dimension"),
        ([np.zeros(2)], "no tensor with a batch dimension"),
    ],
)
def test_data_that_cannot_be_read_is_named(data, said):
    with pytest.raises(BitscapeError, match=said):
        read_samples(data, READER, count=4)
