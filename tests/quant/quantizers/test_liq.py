import pytest
import torch

from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Liq


def weight() -> torch.Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.05


def standardised(w: torch.Tensor) -> torch.Tensor:
    return (w - w.mean()) / w.std(unbiased=False)


def fake_quantizer(w: torch.Tensor, bits: int, restore_scale: bool):
    fake = Liq(restore_scale=restore_scale).for_weight(w, bits)
    fake.initialize(w, Mse())
    return fake


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_are_those_of_the_paper(bits):
    w = weight()
    fake = fake_quantizer(w, bits, False)
    clip, steps = fake.clip.detach(), 2**bits - 1
    unit = ((standardised(w) / clip).clamp(-1, 1) + 1) / 2
    expected = clip * (2 * (unit * steps).round() / steps - 1)
    torch.testing.assert_close(fake(w).detach(), expected, rtol=1e-5, atol=1e-5)
    restored = fake_quantizer(w, bits, True)(w).detach()
    torch.testing.assert_close(restored, expected * w.std(unbiased=False), rtol=1e-5, atol=1e-5)


def test_weights_that_differ_in_spread_and_mean_alone_get_the_same_codes():
    w = weight()
    codes = fake_quantizer(w, 3, True).codes(w).q
    assert torch.equal(fake_quantizer(w * 8 + 3, 3, True).codes(w * 8 + 3).q, codes)


def test_the_clip_learns_the_same_with_and_without_the_restored_scale():
    w = weight()
    grads = []
    for restore_scale in (False, True):
        fake = fake_quantizer(w, 2, restore_scale)
        (fake(w) * torch.linspace(-1, 1, 30)).sum().backward()
        grads.append(fake.clip.grad)
    torch.testing.assert_close(grads[1], grads[0] * w.std(unbiased=False))
