import pytest
import torch

from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Dorefa


def fake_quantizer(w: torch.Tensor, bits: int, restore_scale: bool):
    fake = Dorefa(restore_scale=restore_scale).for_weight(w, bits)
    fake.initialize(w, Mse())
    return fake


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_those_of_the_paper(bits):
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    steps = 2**bits - 1
    unit = w.tanh() / (2 * w.tanh().abs().max()) + 0.5
    expected = 2 * (unit * steps).round() / steps - 1  # Eq. 9
    torch.testing.assert_close(fake_quantizer(w, bits, False)(w), expected)
    torch.testing.assert_close(fake_quantizer(w, bits, True)(w), expected * w.abs().max())


@pytest.mark.parametrize("restore_scale", [False, True])
def test_one_bit_is_the_sign_times_the_mean(restore_scale):
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fake_quantizer(w, 1, restore_scale)(w), w.sign() * w.abs().mean())  # Eq. 7


def test_the_gradient_is_that_of_tanh():
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fake_quantizer(w.detach(), 4, False)(w).sum().backward()
    expected = (1 - w.tanh().square()) / w.tanh().abs().max()
    inner = w.abs() < w.abs().max()  # the largest lies on the bound itself
    torch.testing.assert_close(w.grad[inner], expected.detach()[inner])


def test_nothing_is_learned_but_the_weight():
    w = torch.randn(2, 3)
    assert not list(fake_quantizer(w, 4, True).parameters())
    assert not list(Dorefa().for_activation(4).parameters())


def test_the_sign_passes_every_gradient():
    w = torch.randn(4, 50, requires_grad=True)
    fake = Dorefa().for_weight(w, 1)
    fake.initialize(w, Mse())
    fake(w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    assert torch.equal(fake(w).detach(), fake.codes(w.detach()).dequantize())
