import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitscape.errors import BitscapeError
from bitscape.quant.functional import MINIMUM_SCALE, fake_quantize
from bitscape.quant.grid import grid
from bitscape.quant.observers import MinMax, Mse, Percentile

GRIDS = [
    grid(bits, signed=signed, mid_rise=mid_rise)
    for bits in (1, 2, 3, 4, 8)
    for signed, mid_rise in ((True, False), (False, False), (True, True))
]


def samples(limits, seed=0, groups=3, n=4000):
    """Bell-shaped rows with a few outliers; only positive values for an unsigned grid."""
    x = torch.randn(groups, n, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[0.02], [1.0], [7.0]])
    x[:, :3] *= 5
    return x.abs() if limits.qmin == 0 else x


def squared_error(values, scale, limits):
    return (fake_quantize(values, scale[:, None], limits) - values).square().sum(1)


@pytest.mark.parametrize("limits", GRIDS, ids=repr)
def test_minmax_holds_every_value_and_no_more(limits):
    x = samples(limits)
    scale = MinMax().scale(x, limits)
    if limits.qmax == 0 or limits.qmin < 0:  # the grid reaches to both sides
        assert (x.amin(1) >= (limits.qmin - limits.zero_point) * scale * 1.000001).all()
    assert (x.amax(1) <= (limits.qmax - limits.zero_point) * scale * 1.000001).all()
    below = x.amin(1) / (limits.qmin - limits.zero_point) if limits.qmin < 0 else torch.zeros(3)
    torch.testing.assert_close(scale, torch.maximum(x.amax(1) / (limits.qmax - limits.zero_point), below))


@pytest.mark.parametrize("limits", GRIDS, ids=repr)
def test_mse_is_no_worse_than_the_others(limits):
    x = samples(limits)
    best = squared_error(x, Mse().scale(x, limits), limits)
    for other in (MinMax(), Percentile(), Percentile(percent=99.0)):
        assert (best <= squared_error(x, other.scale(x, limits), limits) * 1.001).all()


@pytest.mark.parametrize("limits", GRIDS, ids=repr)
def test_mse_is_within_5_percent_of_brute_force(limits):
    x = samples(limits, seed=1)
    best = squared_error(x, Mse().scale(x, limits), limits)
    widest = MinMax().scale(x, limits)
    fractions = torch.linspace(0.005, 1.2, 600)
    brute = torch.stack([squared_error(x, widest * fraction, limits) for fraction in fractions]).amin(0)
    assert (best <= 1.05 * brute).all()


def test_percentile_leaves_the_outermost_values_out():
    x = torch.arange(1001.0)[None]
    assert Percentile(percent=99.0).scale(x, grid(8, signed=False)).item() == pytest.approx(990 / 255)
    assert Percentile(percent=100.0).scale(x, grid(8, signed=False)).item() == pytest.approx(1000 / 255)
    assert Percentile(percent=99.0).scale(-x, grid(8, signed=True)).item() == pytest.approx(990 / 128)


@pytest.mark.parametrize("percent", [50.0, 100.1, -1.0])
def test_a_percentile_outside_its_range_is_an_error(percent):
    with pytest.raises(BitscapeError, match=f"percent = {percent}"):
        Percentile(percent=percent)


@pytest.mark.parametrize("observer", [MinMax(), Percentile(), Mse()], ids=repr)
@given(st.sampled_from([0.0, 1e-30, -3.0, 5.0]))
def test_constant_values_give_a_usable_scale(observer, value):
    x = torch.full((1, 9), value)
    for limits in (grid(4, signed=True), grid(1, signed=True), grid(1, signed=False)):
        scale = observer.scale(x, limits)
        assert torch.isfinite(scale).all() and (scale >= MINIMUM_SCALE).all()


def test_rows_do_not_see_each_other():
    limits = grid(3, signed=True)
    x = samples(limits)
    for observer in (MinMax(), Percentile(), Mse()):
        alone = torch.cat([observer.scale(row[None], limits) for row in x])
        torch.testing.assert_close(observer.scale(x, limits), alone)


@pytest.mark.parametrize("observer", [MinMax(), Percentile(), Mse()], ids=repr)
@pytest.mark.parametrize("limits", GRIDS, ids=repr)
@pytest.mark.parametrize("power", [-80, 60])
def test_small_and_large_values_get_the_scale_of_their_size(observer, limits, power):
    x = samples(limits)
    assert torch.equal(observer.scale(x * 2.0**power, limits), observer.scale(x, limits) * 2.0**power)


@pytest.mark.parametrize("observer", [MinMax(), Percentile(), Mse()], ids=repr)
def test_zeros_get_the_least_scale(observer):
    for limits in GRIDS:
        assert observer.scale(torch.zeros(2, 9), limits).tolist() == [MINIMUM_SCALE] * 2
