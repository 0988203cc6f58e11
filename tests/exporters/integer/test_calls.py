import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitscape.exporters.integer.calls import separate_calls
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.graph import trace
from bitscape.exporters.integer.weights import input_scale, integer_weight
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Dorefa, Lsq, LsqPlus, Pact, PerTensor
from tests.exporters.networks import Applied, images, integers, made, quantized

pytestmark = pytest.mark.slow

CALLS = ("tower", "tower:2", "tower:3", "tower:4")


def codes_of(network: nn.Module, name: str):
    layer = quantized_layers(network)[name]
    return integer_weight(name, layer.weight_quantizer.codes(layer.weight))


def test_every_call_has_a_weight_of_its_own_that_tells_its_layer():
    network, _ = integers("pyramid")
    with torch.no_grad():
        before = trace(network, images())
        expected = before.module(images())
        traced, layers = separate_calls(before)
        assert torch.equal(traced.module(images()), expected)
    assert layers == {
        **{f"{name}.weight": "tower" for name in CALLS},
        **{f"{name}.weight": name for name in ("stem", "boxes", "tied", "other")},
        "boxes:2.weight": "boxes",
    }
    assert set(traced.codes) == set(traced.bits) == set(layers)
    taken = [traced.weight_name(node) for node in traced.module.graph.nodes if traced.is_layer(node)]
    assert sorted(taken) == sorted(layers)


def test_a_call_s_name_is_no_other_module_s():
    layers = {"a": nn.Conv2d(3, 3, 1), "a:2": nn.Conv2d(3, 3, 1)}
    network = Applied(lambda net, x: getattr(net, "a:2")(net.a(net.a(x))), **layers)
    _, found = separate_calls(trace(quantized(network), images()))
    assert found == {"a.weight": "a", "a:3.weight": "a", "a:2.weight": "a:2"}


@pytest.mark.parametrize("quantizer", [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(restore_scale=False)], ids=repr)
def test_the_norm_behind_a_call_is_folded_into_that_call(quantizer, caplog):
    def forward(net, x):
        x = F.relu(net.stem(x))
        first, second = F.relu(net.a(net.twice(x))), F.relu(net.b(net.twice(F.max_pool2d(x, 2))))
        return net.head(torch.cat([first.mean((2, 3)), second.mean((2, 3)), net.twice(x).relu().mean((2, 3))], 1))

    convs = {"stem": nn.Conv2d(3, 8, 1), "twice": nn.Conv2d(8, 8, 3)}
    norms = {"a": nn.BatchNorm2d(8), "b": nn.BatchNorm2d(8, affine=False)}
    network = quantized(made(lambda: Applied(forward, **convs, **norms, head=nn.Linear(24, 5))), bits=[(4, 8)], quantizer=quantizer)
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        integer = integer_network(network, images())
    assert not [record for record in caplog.records if record.name == "bitscape.exporters"]
    codes = codes_of(network, "twice")
    for name, norm in {"twice": network.a, "twice:2": network.b, "twice:3": None}.items():
        factor, shift, bias = torch.ones(8).double(), torch.zeros(8).double(), network.twice.bias.double()
        if norm is not None:
            factor = (norm.running_var.double() + norm.eps).rsqrt() * (norm.weight.double() if norm.affine else 1)
            shift = (norm.bias.double() if norm.affine else 0) - norm.running_mean.double() * factor
        weight, scale = integer.weights[f"{name}.weight"], input_scale(integer.module.graph, f"{name}.weight")
        assert torch.equal(weight.q, codes.q)
        torch.testing.assert_close(weight.scale.double(), codes.scale * factor, rtol=3e-7, atol=0)
        expected = (bias * factor + shift) / (weight.scale * torch.tensor(scale))
        assert (integer.biases[f"{name}.weight"] - expected).abs().max() <= 0.5001
    with torch.no_grad():
        torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.05, atol=0.05)


def test_calls_may_take_inputs_of_different_scales():
    """The first shares its tensor with a layer of a wider quantizer, which then serves both."""

    def forward(net, x):
        x = F.relu(net.stem(x))
        return net.shared(F.relu(net.shared(x))), net.other(x)

    convs = {"stem": nn.Conv2d(3, 4, 1), "shared": nn.Conv2d(4, 4, 1), "other": nn.Conv2d(4, 2, 1)}
    network = quantized(made(lambda: Applied(forward, **convs)), bits=[(8, 8)])
    scale = network.shared.input_quantizer.scale.detach().clone()
    with torch.no_grad():
        network.other.input_quantizer.scale.copy_(4 * scale)
    integer, bias = integer_network(network, images()), network.shared.bias.double()
    for name, expected in (("shared", 4 * scale), ("shared:2", scale)):
        assert input_scale(integer.module.graph, f"{name}.weight") == float(expected)
        spacing = integer.weights[f"{name}.weight"].scale * expected
        assert (integer.biases[f"{name}.weight"] - bias / spacing).abs().max() <= 0.5001


def test_layers_tied_by_one_weight_have_codes_of_their_own_bits():
    network, integer = integers("pyramid", ((8, 8), (3, 8), (8, 8), (5, 8), (2, 8)))
    for name, bits in (("tied", 5), ("other", 2)):
        weight = integer.weights[f"{name}.weight"]
        assert torch.equal(weight.q, codes_of(network, name).q) and weight.bits <= bits
    with torch.no_grad():
        torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.05, atol=0.05)
