import pytest
import torch

from bitscape.errors import BitscapeError
from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Pact


def pact_at(clip: float, bits: int = 2, decay: float = 0.0, signed: bool = False):
    fake = Pact(decay=decay).for_activation(bits)
    fake.initialize(torch.tensor([-1.0 if signed else 0.0, 1.0]), Mse())
    fake.clip.data.fill_(clip)
    return fake


def test_levels_lie_between_zero_and_the_clip():
    x = torch.tensor([-1.0, 0.4, 0.6, 1.4, 2.9, 3.0, 9.0])
    assert pact_at(3.0)(x).tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_the_clip_learns_from_what_lies_beyond_it():
    x = torch.tensor([-1.0, 0.4, 2.9, 3.5, 9.0], requires_grad=True)
    fake = pact_at(3.0)
    (fake(x) * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).sum().backward()
    assert fake.clip.grad == 24
    assert x.grad.tolist() == [0, 2, 4, 0, 0]


def test_the_decay_pulls_at_the_clip():
    fake = pact_at(3.0, decay=0.5)
    fake(torch.tensor([1.0, 9.0])).sum().backward()
    assert fake.clip.grad == 1 + 0.5 * 3


def test_signed_values_are_clipped_on_both_sides():
    y = pact_at(3.0, bits=3, signed=True)(torch.tensor([-9.0, -1.2, 0.0, 9.0]))
    torch.testing.assert_close(y, torch.tensor([-3.0, -1.0, 0.0, 3.0]))


def test_one_signed_bit_is_the_sign_of_the_clip():
    y = pact_at(3.0, bits=1, signed=True)(torch.tensor([-9.0, -1.2, 0.1, 9.0]))
    torch.testing.assert_close(y, torch.tensor([-3.0, -3.0, 3.0, 3.0]))


def test_a_negative_decay_is_an_error():
    with pytest.raises(BitscapeError, match="decay = -1"):
        Pact(decay=-1)
