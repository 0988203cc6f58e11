import torch
from torch import nn

from bitscape.sharpness.members import OfParameter


def test_members_that_autograd_hands_one_tensor_keep_their_own():
    one, two = (OfParameter(parameter=nn.Parameter(torch.ones(3)), is_gain=False) for _ in range(2))
    handles = [one.watched(), two.watched()]
    for _ in range(2):
        (one.parameter + two.parameter).sum().backward()
    for handle in handles:
        handle.remove()
    (one.parameter * 5).sum().backward()  # no longer watched
    assert torch.equal(one.gradient, torch.full((3,), 2.0)) and torch.equal(two.gradient, torch.full((3,), 2.0))
