import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.once import weights_quantized_once

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution that runs twice, and one that runs once."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.second(self.first(self.first(x).relu()).relu())


@pytest.fixture
def network():
    policy = Policy({"first": LayerBits(3, 4), "second": LayerBits(4, 4)})
    return calibrate(with_quantizers(Net(), policy), IMAGES)


def counted(network, monkeypatch):
    """Count how often each layer's weight is quantized."""
    counts = {}
    for name, layer in quantized_layers(network).items():
        quantizer, counts[name] = layer.weight_quantizer, 0

        def quantized(x, name=name, own=quantizer.quantized):
            counts[name] += 1
            return own(x)

        monkeypatch.setattr(quantizer, "quantized", quantized)
    return counts


def test_gradients_of_parts_are_those_without_the_block(network):
    alike = copy.deepcopy(network)
    for part in IMAGES.split(2):
        alike(part).square().sum().backward()
    with weights_quantized_once(network):
        for part in IMAGES.split(2):
            network(part).square().sum().backward()
    for (name, ours), (_, expected) in zip(
        network.named_parameters(), alike.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_weight_is_quantized_at_its_first_use_alone(network, monkeypatch):
    counts = counted(network, monkeypatch)
    expected = network(IMAGES)
    assert counts == {"first": 2, "second": 1}
    with torch.no_grad(), weights_quantized_once(network):
        assert torch.equal(network(IMAGES), expected) and torch.equal(network(IMAGES), expected)
    assert counts == {"first": 3, "second": 2}


def test_after_the_block_weights_may_change(network):
    with torch.no_grad():
        with weights_quantized_once(network):
            network(IMAGES)
        network.first.weight.mul_(-1)
        expected = network(IMAGES)
        with weights_quantized_once(network):
            assert torch.equal(network(IMAGES), expected)


def test_an_inner_block_passes_gradients_on_and_keeps_the_results(network, monkeypatch):
    counts, weight = counted(network, monkeypatch), network.first.weight
    with weights_quantized_once(network):
        for _ in range(2):
            network.zero_grad()
            with weights_quantized_once(network):
                network(IMAGES).square().sum().backward()
            seen = weight.grad.clone()
    assert counts["first"] == 1
    network.zero_grad()
    network(IMAGES).square().sum().backward()
    torch.testing.assert_close(seen, weight.grad)


def test_a_block_that_fails_leaves_nothing_behind(network):
    with pytest.raises(ZeroDivisionError), weights_quantized_once(network):
        network(IMAGES).square().sum().backward()
        raise ZeroDivisionError
    assert network.first.weight.grad is None
    network(IMAGES).square().sum().backward()
    assert network.first.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_take_the_same_weight(network, reentrant):
    def forward(net):
        inner = checkpoint(
            lambda x: net.first(x).relu(), IMAGES.clone().requires_grad_(), use_reentrant=reentrant
        )
        return net.second(net.first(inner).relu())

    alike = copy.deepcopy(network)
    forward(alike).square().sum().backward()
    with weights_quantized_once(network):
        forward(network).square().sum().backward()
    for (name, ours), (_, expected) in zip(
        network.named_parameters(), alike.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_first_use_without_gradients_takes_none_from_later_ones(network):
    with weights_quantized_once(network):
        with torch.no_grad():
            network(IMAGES)
        network(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_copies_made_within_a_block_are_outside_of_it(network):
    with weights_quantized_once(network):
        network(IMAGES)
        twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.second.weight.zero_()
        assert not torch.equal(twin(IMAGES), network(IMAGES))


def test_an_inner_block_on_more_layers_ends_for_all_of_them(network):
    with (
        torch.no_grad(),
        weights_quantized_once(nn.Sequential(network.first)),
        weights_quantized_once(network),
    ):
        network(IMAGES)
    assert {layer.weight_quantizer.results for layer in quantized_layers(network).values()} == {
        None
    }


def test_the_block_may_stand_in_inference_mode(network):
    expected = network(IMAGES)
    with torch.inference_mode(), weights_quantized_once(network):
        assert torch.equal(network(IMAGES), expected)
