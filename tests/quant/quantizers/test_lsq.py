import math

import pytest
import torch

from bitscape.errors import BitscapeError
from bitscape.quant.functional import MINIMUM_SCALE
from bitscape.quant.grid import grid
from bitscape.quant.observers import MinMax, Mse
from bitscape.quant.quantizers import Lsq, PerChannel, PerTensor
from bitscape.quant.quantizers.lsq import lsq_gradient_factor


def test_the_gradient_factor_counts_the_elements_that_share_a_scale():
    w = torch.randn(6, 4, 3, 3)
    assert Lsq().for_weight(w, 3).gradient_factor == pytest.approx(1 / math.sqrt(4 * 9 * 3))
    assert Lsq(weight_scales=PerTensor()).for_weight(w, 3).gradient_factor == pytest.approx(1 / math.sqrt(w.numel() * 3))
    assert lsq_gradient_factor(16, grid(1, signed=True).qmax) == 0.25  # qmax 0 counts as 1


def test_the_learned_scales_move_at_the_papers_pace():
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    fake = Lsq().for_weight(w, 3)
    fake.initialize(w, Mse())
    fake(w).sum().backward()
    scale = fake.scale.detach()
    v = w / scale
    slope = torch.where(v < -4, -4.0, torch.where(v > 3, 3.0, v.round() - v))
    expected = slope.sum((1, 2, 3), keepdim=True) / math.sqrt(36 * 3)
    torch.testing.assert_close(fake.scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_training_made_negative_is_held_above_zero():
    w = torch.randn(2, 3)
    fake = Lsq().for_weight(w, 4)
    fake.initialize(w, MinMax())
    fake.scale.data.fill_(-1.0)
    assert torch.equal(fake.codes(w).scale, torch.full((2, 1), MINIMUM_SCALE))
    assert fake(w).abs().max() <= 8 * MINIMUM_SCALE


def test_bits_may_differ_by_channel_and_by_image():
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    fake = Lsq().for_weight(w, torch.tensor([[1], [2], [8]]))
    fake.scale.data.fill_(0.1)
    fake.initialized = True
    assert [len(row.unique()) for row in fake(w)[:2]] == [2, 4]
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).relu()
    inputs = Lsq().for_activation(torch.tensor([1, 2, 3]).reshape(3, 1, 1, 1))
    inputs.scale.data.fill_(0.01)
    inputs.initialized = True
    assert [round(image.max().item() / 0.01) for image in inputs(x)] == [1, 3, 7]
    assert "per element" in repr(inputs)


def test_a_scale_below_the_minimum_still_learns():
    w = torch.randn(2, 3)
    fake = Lsq().for_weight(w, 4)
    fake.initialize(w, MinMax())
    fake.scale.data.fill_(MINIMUM_SCALE / 100)
    fake(w).backward(torch.randn(2, 3))
    assert (fake.scale.grad != 0).all()


def test_values_on_the_ends_of_the_grid_count_as_inside():
    # Repaired weights lie there; on one scale and on a scale for each channel alike.
    w = torch.tensor([[-0.8, 0.7, 0.3], [-0.8, 0.7, 0.3]], requires_grad=True)
    for sharing in (PerTensor(), PerChannel()):
        fake = Lsq(weight_scales=sharing).for_weight(w, 4)
        fake.initialize(w, MinMax())
        fake.scale.data.fill_(0.1)
        (gradient,) = torch.autograd.grad(fake(w).sum(), w)
        assert torch.equal(gradient, torch.ones_like(w))


def test_each_channel_may_have_its_own_bits():
    w = torch.randn(3, 40)
    bits = torch.tensor([[2], [4], [8]])
    fake = Lsq().for_weight(w, bits)
    fake.initialize(w, Mse())
    for row, width in enumerate((2, 4, 8)):
        alone = Lsq().for_weight(w[[row]], width)
        alone.initialize(w[[row]], Mse())
        torch.testing.assert_close(fake(w)[[row]], alone(w[[row]]))


def test_widths_that_match_no_scale_are_an_error():
    w = torch.randn(3, 40)
    fake = Lsq(weight_scales=PerTensor()).for_weight(w, torch.tensor([[2], [4], [8]]))
    with pytest.raises(BitscapeError, match="3 widths for 1 scales"):
        fake.initialize(w, Mse())


def test_coarse_scales_are_multiples_of_the_usual_ones():
    w = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    usual, coarse = Lsq().for_weight(w, 4), Lsq(coarseness=2.0).for_weight(w, 4)
    for fake in (usual, coarse):
        fake.initialize(w, Mse())
    assert torch.equal(coarse.scale, 2 * usual.scale)
    with pytest.raises(BitscapeError, match="coarseness = 0: a number above 0"):
        Lsq(coarseness=0)
