import math

import torch
from torch import nn

from bitscape.quant.convert import bypassed
from bitscape.quant.quantizers import Lsq, PerTensor
from bitscape.sharpness import Ball
from bitscape.sharpness.members import OfBoth, OfParameter, OfQuantizedWeight
from tests.sharpness.small import gradients, small_net


def test_members_that_autograd_hands_one_tensor_keep_their_own():
    one, two = (OfParameter(parameter=nn.Parameter(torch.ones(3)), is_gain=False) for _ in range(2))
    handles = [one.watched(), two.watched()]
    for _ in range(2):
        (one.parameter + two.parameter).sum().backward()
    for handle in handles:
        handle.remove()
    (one.parameter * 5).sum().backward()  # no longer watched
    assert torch.equal(one.gradient, torch.full((3,), 2.0)) and torch.equal(two.gradient, torch.full((3,), 2.0))


def test_a_gradient_in_a_parameter_is_passed_on_as_it_is():
    gradient, model = torch.randn(4, 2, 3, 3), small_net()
    layer = model[0]
    for member in (
        OfParameter(parameter=layer.weight, is_gain=True),
        OfBoth(parameter=layer.weight, quantizer=layer.weight_quantizer, is_gain=True),
    ):
        ((parameter, passed),) = member.passed_on(gradient)
        assert parameter is layer.weight and torch.equal(passed, gradient)


def test_a_gradient_in_a_quantized_weight_is_passed_straight_through():
    model = small_net(quantizer=Lsq(weight_scales=PerTensor()))
    layer, gradient = model[4], torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    w, quantizer = layer.weight.detach(), layer.weight_quantizer
    s = quantizer.scale.detach().mul_(0.6)  # so that some weights are out of range
    member = OfQuantizedWeight(parameter=layer.weight, quantizer=quantizer, is_gain=True)
    passed = dict(member.passed_on(gradient))
    # LSQ, Eq. 3 and 5, with codes -4 .. 3.
    inside = (w >= -4 * s) & (w <= 3 * s)
    assert 0 < int(inside.sum()) < inside.numel()
    q = (w / s).round().clamp(-4, 3)
    of_scale = (gradient * torch.where(inside, q - w / s, q)).sum() / math.sqrt(w.numel() * 3)
    assert passed.keys() == {layer.weight, quantizer.scale}
    assert torch.equal(passed[layer.weight], gradient * inside)
    torch.testing.assert_close(passed[quantizer.scale], of_scale, rtol=1e-4, atol=1e-5)
    assert not gradients(model)  # nor is any `.grad` touched


def test_a_gradient_is_passed_on_to_what_is_trained():
    model = small_net()
    gradient, layer = torch.randn(4, 2, 3, 3), model[0]
    layer.weight_quantizer.scale.requires_grad_(False)
    assert [p for p, _ in Ball().members(model)["0.weight"].passed_on(gradient)] == [layer.weight]
    with bypassed(model):
        ((parameter, passed),) = Ball().members(model)["0.weight"].passed_on(gradient)
        assert parameter is layer.weight and torch.equal(passed, gradient)
