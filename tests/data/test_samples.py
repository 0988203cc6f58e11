import pytest
import torch

from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError


def numbered(count, *shape):
    return torch.arange(count).float().view(-1, *(1 for _ in shape)).expand(count, *shape)


def firsts(batches):
    return [batch.inputs.flatten(1)[:, 0].tolist() for batch in batches]


def test_batches_hold_all_samples_in_order():
    samples = Samples([Minibatch(numbered(3, 2)), Minibatch(numbered(3, 2) + 3)])
    assert firsts(samples.batches(4)) == [[0, 1, 2, 3], [4, 5]]
    assert len(samples) == 6


def test_a_single_sample_at_the_end_joins_the_batch_before_it():
    assert firsts(Samples.of(numbered(5, 2)).batches(2)) == [[0, 1], [2, 3, 4]]
    assert firsts(Samples.of(numbered(1, 2)).batches(2)) == [[0]]


def test_samples_of_different_shapes_never_share_a_batch():
    samples = Samples([Minibatch(numbered(2, 4)), Minibatch(numbered(3, 5))])
    assert [tuple(batch.inputs.shape) for batch in samples.batches(8)] == [(2, 4), (3, 5)]


def test_the_first_samples_and_those_behind_them_make_up_all():
    samples = Samples([Minibatch(numbered(2, 4)), Minibatch(numbered(3, 5) + 2)])
    for count in range(1, 5):
        assert len(samples.first(count)) == count
        assert len(samples.after(count)) == 5 - count
        together = firsts(samples.first(count).batches(9)) + firsts(samples.after(count).batches(9))
        assert [value for batch in together for value in batch] == [0, 1, 2, 3, 4]
    with pytest.raises(BitscapeError, match="no sample"):
        samples.after(5)


def test_several_inputs_and_targets_are_cut_together():
    samples = Samples.of({"a": numbered(3, 2), "b": (numbered(3, 1), 7)}, torch.tensor([5, 6, 7]))
    first, second = samples.first(1), samples.after(1)
    assert first.parts[0].inputs["b"][1] == 7
    assert second.parts[0].targets.tolist() == [6, 7]
    assert samples.shapes == [[2], [1]]
    assert samples.labelled


def test_a_tensor_of_every_sample_stays_whole():
    samples = Samples([Minibatch((numbered(2, 4), torch.zeros(9))), Minibatch((numbered(2, 4), torch.zeros(9)))])
    assert [batch.inputs[1].shape for batch in samples.batches(4)] == [(9,), (9,)]


def test_no_sample_is_an_error():
    with pytest.raises(BitscapeError, match="data: it holds no sample"):
        Samples([])


def test_samples_print_the_tensors_of_each_part():
    labelled = Minibatch({"a": numbered(3, 2), "b": (numbered(3, 4, 5),)}, torch.arange(3))
    lines = [line.split() for line in repr(Samples([labelled, Minibatch(numbered(2, 7), torch.arange(2))])).splitlines()]
    assert lines == [
        ["Samples:", "5", "samples"],
        ["samples", "tensor", "shape", "of", "one", "type"],
        ["3", "inputs.a", "2", "float32"],
        ["3", "inputs.b.0", "4x5", "float32"],
        ["3", "targets", "int64"],
        ["2", "inputs", "7", "float32"],
        ["2", "targets", "int64"],
    ]
    assert repr(Samples.of(numbered(1, 2))).splitlines()[0] == "Samples: 1 sample, no targets"
    assert len(repr(Samples([Minibatch(numbered(2, size)) for size in range(1, 30)])).splitlines()) == 10
