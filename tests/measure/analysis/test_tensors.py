import math

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.measure.analysis import tensors
from bitscape.measure.analysis.tensors import NoiseMeter, decibels, energy
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Lsq, LsqPlus


def at_scale(bits: int, scale: float, *, signed: bool = False) -> nn.Module:
    quantizer = Lsq().for_activation(bits)
    quantizer.initialize(torch.tensor([-1.0 if signed else 0.0, 1.0]), MinMax())
    quantizer.scale.data.fill_(scale)
    return quantizer


def measured(quantizer: nn.Module, *batches: torch.Tensor):
    meter = NoiseMeter(quantizer)
    for batch in batches:
        meter.add(batch, quantizer(batch))
    return meter.result()


def test_signal_to_noise_is_that_of_a_calculation_by_hand():
    # Two unsigned bits at scale 1 hold 0, 1, 2, 3: errors are 0.25, 0.25, 0, 2.
    noise = measured(at_scale(2, 1.0), torch.tensor([0.25, 1.75, 2.0, 5.0]))
    assert noise.sqnr_db == pytest.approx(10 * math.log10((0.0625 + 3.0625 + 4 + 25) / (0.0625 + 0.0625 + 4)))
    assert (noise.bits, noise.clip_min, noise.clip_max) == (2, 0.0, 3.0)
    assert (noise.low, noise.high) == (0.25, 5.0)


def test_values_are_clipped_from_half_a_step_beyond_the_grid():
    values = torch.tensor([-0.6, -0.4, 1.0, 3.4, 3.6, 9.0])
    assert measured(at_scale(2, 1.0), values).clipped == 3 / 6


def test_a_value_on_the_grid_has_no_noise():
    noise = measured(at_scale(4, 0.5), torch.arange(16) * 0.5)
    assert noise.sqnr_db is None and noise.clipped == 0.0


def test_moments_are_those_of_all_values_whatever_the_batches(monkeypatch):
    values = 100 + torch.randn(5000, generator=torch.Generator().manual_seed(0))
    exact = values.double() - values.double().mean()
    kurtosis = float(exact.pow(4).mean() / exact.square().mean() ** 2)
    monkeypatch.setattr(tensors, "PART", 64)
    for batches in ([values], values.split(700)):
        noise = measured(at_scale(8, 0.5), *batches)
        assert noise.kurtosis == pytest.approx(kurtosis, rel=1e-4)
        assert noise.std == pytest.approx(float(exact.std(correction=0)), rel=1e-5)


def test_equal_values_have_no_kurtosis():
    noise = measured(at_scale(8, 0.1), torch.full((9,), 0.3))
    assert noise.kurtosis is None and noise.std == pytest.approx(0, abs=1e-6)


def test_percentiles_and_histogram_are_of_all_values_of_a_small_tensor():
    noise = measured(at_scale(8, 1.0), torch.arange(1001.0) / 1000)
    assert noise.percentiles == pytest.approx((0.001, 0.01, 0.5, 0.99, 0.999))
    assert sum(noise.histogram) == 1001 and max(noise.histogram) - min(noise.histogram) <= 1


def test_memory_does_not_grow_with_the_batches():
    meter, quantizer = NoiseMeter(at_scale(8, 0.01)), at_scale(8, 0.01)
    for _ in range(40):
        batch = torch.rand(20_000)
        meter.add(batch, quantizer(batch))
    assert sum(meter.result().histogram) <= 1 << 16


def test_a_weight_is_clipped_by_its_own_channels_grid():
    weight = torch.tensor([[0.1, -0.1, 0.4], [1.0, -1.0, 4.0]])
    quantizer = Lsq().for_weight(weight, 2)
    quantizer.initialize(weight, MinMax())
    quantizer.scale.data.copy_(torch.tensor([[0.1], [1.0]]))  # levels -2, -1, 0, 1
    noise = measured(quantizer, weight)
    assert noise.clipped == 2 / 6
    assert (noise.clip_min, noise.clip_max) == (-2.0, 1.0)
    assert noise.sqnr_db == pytest.approx(10 * math.log10(18.18 / 9.09), abs=1e-4)


@pytest.mark.parametrize("kind", [LsqPlus(), Dorefa()])
def test_grids_with_an_offset_or_a_transform_have_their_ends(kind):
    values = torch.tensor([-0.5, 0.0, 1.0])
    quantizer = kind.for_activation(8)
    quantizer.initialize(values, MinMax())
    noise = measured(quantizer, values)
    low, high = quantizer(torch.tensor([-100.0, 100.0])).tolist()
    assert noise.clip_min == pytest.approx(low) and noise.clip_max == pytest.approx(high)


def test_values_that_are_not_finite_are_refused():
    meter = NoiseMeter(at_scale(8, 0.1))
    meter.add(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0]))
    with pytest.raises(BitscapeError, match="not finite; check the checkpoint"):
        meter.result()


def test_sums_of_squares_and_decibels():
    assert energy(torch.tensor([3.0, 4.0])) == 25
    assert decibels(100.0, 1.0) == 20
    assert decibels(1.0, 0.0) is None and decibels(0.0, 1.0) is None
