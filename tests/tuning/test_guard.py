import pytest
import torch

from bitscape.data.samples import Samples
from bitscape.engine.task import Classes
from bitscape.tuning.guard import Guard
from tests.tuning.small import float_net, images, quantized

HELD_OUT = Samples.of(images(6))


def test_the_divergence_is_the_task_s_mean_over_the_images_held_out():
    network, float_network = quantized(float_net()), float_net()
    guard = Guard(network, float_network, HELD_OUT, Classes())
    with torch.no_grad():
        expected = Classes().divergence(network(images(6)), float_network(images(6))).mean()
    assert guard.before == guard.divergence() == pytest.approx(float(expected))


def test_what_comes_no_closer_is_taken_back(caplog):
    network, float_network = quantized(float_net()), float_net()
    before = network(images(6))
    guard = Guard(network, float_network, HELD_OUT, Classes())
    with torch.no_grad():
        network[-1].bias += 100 * torch.arange(5)
    with caplog.at_level("INFO", logger="bitscape.tuning"):
        guard.decide("tuning")
    assert torch.equal(network(images(6)), before)
    assert "tuning: divergence on 6 images held out" in caplog.text and "taken back" in caplog.text


def test_what_comes_closer_is_kept():
    network, float_network = quantized(float_net()), float_net()
    bias = network[-1].bias.detach().clone()
    with torch.no_grad():
        network[-1].bias += 100 * torch.arange(5)
    guard = Guard(network, float_network, HELD_OUT, Classes())
    with torch.no_grad():
        network[-1].bias.copy_(bias)
    guard.decide("tuning")
    assert torch.equal(network[-1].bias, bias)
