import torch

from bitscape.quant import samples as module
from bitscape.quant.samples import ValueSample


def sampled(batches):
    sample = ValueSample()
    for batch in batches:
        sample.add(batch)
    return sample.values()


def test_the_sample_of_a_map_holds_every_column():
    columns = torch.arange(14.0).expand(32, 256, 14, 14)
    assert set(sampled([columns]).tolist()) == set(range(14))


def test_few_values_are_all_kept_in_order_with_the_extremes_of_all_batches_last():
    batches = [torch.tensor([[3.0, -1.0]]), torch.tensor([2.0]), torch.tensor([[[7.0]]], dtype=torch.bfloat16)]
    assert sampled(batches).tolist() == [3.0, -1.0, 2.0, 7.0, -1.0, 7.0]


def test_the_size_is_bounded_and_every_batch_has_the_same_chance(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 2000)
    values = sampled([torch.full((50,), float(number)) for number in range(400)])
    assert len(values) == 2000 + 2 and values[-2:].tolist() == [0.0, 399.0]
    by_tenth = (values[:-2] / 40).long().bincount()
    assert len(by_tenth) == 10 and (by_tenth - 200).abs().max() < 50  # 3.7 deviations of a fair draw


def test_extremes_stay_whenever_they_come_and_the_same_data_gives_the_same_sample(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 100)
    batches = list(torch.randn(300, 20, generator=torch.Generator().manual_seed(1)))
    batches[0][0], batches[299][5] = -90.0, 80.0
    values = sampled(batches)
    assert values[-2:].tolist() == [-90.0, 80.0]
    assert torch.equal(values, sampled(batches))


def test_memory_is_bounded_by_twice_the_sample(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 100)
    sample = ValueSample()
    for _ in range(500):
        sample.add(torch.rand(30))
        assert sum(map(len, sample._values)) <= 200


def test_what_is_not_finite_is_seen():
    assert sampled([torch.zeros(3), torch.tensor([float("nan")]), torch.zeros(3)])[-2:].isnan().all()
