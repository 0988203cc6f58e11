import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.graph import trace
from bitscape.exporters.integer.norms import fold_into_integers, norm_arguments
from bitscape.exporters.integer.weights import LARGEST_BIAS, input_scale, integer_weight
from bitscape.models.named_outputs import named_outputs
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor
from tests.exporters.networks import Applied, images, quantized
from tests.networks import conv_norm

pytestmark = pytest.mark.slow

QUANTIZERS = [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(restore_scale=False), Liq()]
EPSILON = 0.01
aten = torch.ops.aten


def folded_cases() -> nn.Module:
    """Norms that can be folded, with every kind of gamma, and such that cannot."""

    def forward(net, x):
        vector = net.after_linear(net.linear(net.plain(x).mean((2, 3))))
        x = F.relu(net.biased(x))
        shared = F.relu(net.norm(net.shared(F.relu(net.shared(x)))))
        twice = net.twice(x)
        x = shared + F.relu(net.second(twice)) + twice
        return vector, net.last(F.relu(net.in_front(x)))

    plain = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False))
    layers = {"plain": plain, "linear": nn.Linear(6, 5), "after_linear": nn.BatchNorm1d(5), "biased": nn.Sequential(*conv_norm(3, 6, 3))}
    layers |= {"shared": nn.Conv2d(6, 6, 1), "norm": nn.BatchNorm2d(6), "twice": nn.Conv2d(6, 6, 1, groups=2), "second": nn.BatchNorm2d(6)}
    network = Applied(forward, **layers, in_front=nn.BatchNorm2d(6), last=nn.Conv2d(6, 4, 1))
    network.biased[0].bias = nn.Parameter(torch.randn(6))
    return network


@pytest.fixture(scope="module", params=QUANTIZERS, ids=repr)
def folded(request):
    torch.manual_seed(0)
    network = quantized(folded_cases(), bits=[(4, 8)], quantizer=request.param)
    norm = network.biased[1]
    norm.weight.data[:4] = torch.tensor([0.0, -2.0, 1e-36, -1e-3])
    return network, integer_network(network, images())


class TestNorms:
    def test_norms_behind_layers_go_and_others_stay(self, folded):
        norms = [node for node in folded[1].module.graph.nodes if "batch_norm" in str(node.target)]
        assert [str(node.args[1]) for node in norms] == ["second_weight", "in_front_weight"]

    def test_scales_are_those_of_the_layer_times_gamma_over_sigma(self, folded):
        network, integer = folded
        norm = network.biased[1]
        layer = quantized_layers(network)["biased.0"]
        codes = integer_weight("w", layer.weight_quantizer.codes(layer.weight))
        weight = integer.weights["biased.0.weight"]
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        expected = (codes.scale * factor).float()
        alive = expected.abs() > 1e-30
        assert alive.tolist() == [False, True, False, True, True, True]
        torch.testing.assert_close(weight.scale[alive], expected[alive], rtol=3e-7, atol=0)
        assert torch.equal(weight.q[alive], codes.q[alive]) and not weight.q[~alive].any()
        assert bool((weight.scale[1] < 0) and (weight.scale[3] < 0) and (weight.scale[4] > 0))

    def test_biases_are_whole_units_of_input_scale_times_weight_scale(self, folded):
        network, integer = folded
        layer, norm = network.biased
        expected = (layer.bias.double() - norm.running_mean) * norm.weight / (norm.running_var.double() + norm.eps).sqrt() + norm.bias
        spacing = integer.weights["biased.0.weight"].scale.double() * input_scale(integer.module.graph, "biased.0.weight")
        codes = integer.biases["biased.0.weight"]
        assert codes.dtype == torch.int64 and codes.abs().max() <= LARGEST_BIAS
        assert ((codes * spacing - expected).abs() <= spacing.abs() * 0.51 + expected.abs() * 1e-6).all()
        assert torch.equal(integer.module.get_parameter("biased.0.bias"), codes.float() * spacing.float())

    def test_layers_without_a_bias_get_one_from_their_norm_alone(self, folded):
        layers = ("plain.0", "biased.0", "linear", "shared", "shared:2", "twice", "last")
        assert set(folded[1].biases) == {f"{name}.weight" for name in layers}

    def test_the_simulation_is_near_the_network(self, folded):
        network, integer = folded
        with torch.no_grad():
            outputs = named_outputs(integer.module(images())), named_outputs(network(images()))
            for found, expected in zip(*(each.values() for each in outputs), strict=True):
                assert (found - expected).norm() < 0.12 * expected.norm()  # 4 bits: one code more or less moves the layers behind


FORMS = {
    "as torch.export has it": (None, []),
    "batch_norm": (aten.batch_norm.default, [False, 0.1, EPSILON, True]),
    "native_batch_norm": (aten.native_batch_norm.default, [False, 0.1, EPSILON]),
    "_native_batch_norm_legit": (aten._native_batch_norm_legit.default, [False, 0.1, EPSILON]),
    "_batch_norm_no_update": (aten._batch_norm_no_update.default, [0.1, EPSILON]),
    "cudnn_batch_norm": (aten.cudnn_batch_norm.default, [False, 0.1, EPSILON]),
}


@pytest.mark.parametrize("form", FORMS)
def test_norms_are_folded_in_every_form_that_torch_gives_them(form, caplog):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=EPSILON)
    network = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)), bits=[(8, 8)])
    traced = trace(network, images())
    found = next(node for node in traced.module.graph.nodes if norm_arguments(node))
    target, settings = FORMS[form]
    if target is not None:
        found.target, found.args = target, (*found.args[:5], *settings)
        if len(target._schema.returns) == 1:
            (first,) = found.users
            first.replace_all_uses_with(found)
            traced.module.graph.erase_node(first)
    weights = {key: integer_weight(key, codes) for key, codes in traced.codes.items()}
    before = weights["0.weight"].scale.double()
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        biases = fold_into_integers(traced, weights)
    factor = norm.weight.double() / (norm.running_var.double() + EPSILON).sqrt()
    torch.testing.assert_close(weights["0.weight"].scale, (before * factor).float(), rtol=3e-7, atol=0)
    expected = (network[0].bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    torch.testing.assert_close(biases["0.weight"], expected)
    left = [str(node.target).removesuffix(".default") for node in traced.module.graph.nodes if node.op == "call_function"]
    assert [name for name in left if "sym_size" not in name] == [
        "bitscape.fake_quantize",
        "aten.conv2d",
        "aten.relu",
        "bitscape.fake_quantize",
        "aten.conv2d",
    ]
    assert not [record for record in caplog.records if record.name == "bitscape.exporters"]


def test_norms_that_stay_float_are_named_with_the_reason(caplog):
    network = quantized(folded_cases(), bits=[(8, 8)])
    network.biased[1].running_mean = network.biased[1].running_var = None
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        integer_network(network, images())
    assert [record.getMessage() for record in caplog.records] == [
        "batch norms that stay float, 1 (it takes mean and deviation from each batch): biased.1",
        "batch norms that stay float, 1 (something else takes its layer's output, too): second",
        "batch norms that stay float, 1 (it stands behind no integer layer): in_front",
    ]


def test_a_norm_of_tokens_stays_float(caplog):
    def forward(net, x):
        return net.norm(net.linear(x.flatten(2).transpose(1, 2)))

    network = quantized(Applied(forward, linear=nn.Linear(3, 4), norm=nn.BatchNorm1d(64)), bits=[(8, 8)])
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        integer = integer_network(network, images())
    assert [record.getMessage() for record in caplog.records] == ["batch norms that stay float, 1 (its channels are not the layer's): norm"]
    with torch.no_grad():
        torch.testing.assert_close(integer.module(images()), network(images()), rtol=1e-3, atol=1e-3)


MOVES = {
    "transpose": lambda net, y: net.norm(y.transpose(1, 2)).transpose(1, 2),
    "transpose from behind": lambda net, y: net.norm(y.transpose(-1, -2)).transpose(-1, -2),
    "permute": lambda net, y: net.norm(y.permute(0, -1, 1)).permute(0, 2, 1),
    "flatten": lambda net, y: net.norm(y.flatten(0, 1)).reshape_as(y),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_norm_of_channels_that_were_moved_is_folded(move, caplog):
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(3, 64), "norm": nn.BatchNorm1d(64), "last": nn.Linear(64, 2)}
    network = Applied(lambda net, x: net.last(MOVES[move](net, net.linear(x.flatten(2).transpose(1, 2)))), **layers)
    network = quantized(network, bits=[(8, 8)])
    before = integer_weight("w", quantized_layers(network)["linear"].weight_quantizer.codes(network.linear.weight))
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        integer = integer_network(network, images())
    assert not [record for record in caplog.records if record.name == "bitscape.exporters"]
    factor = network.norm.weight.double() / (network.norm.running_var.double() + network.norm.eps).sqrt()
    torch.testing.assert_close(integer.weights["linear.weight"].scale, (before.scale * factor).float(), rtol=3e-7, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(integer.module(images(3)), network(images(3)), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda net, y: net.norm(y.reshape(y.shape[0] * 32, 2, 64).transpose(1, 2).reshape(y.shape[0] * 32, 64, 2)).reshape_as(y) + y[:, :1],
        lambda net, y: net.norm(y.reshape(y.shape[0], 64, 64)).reshape(y.shape[0], 64, 64),
        lambda net, y: net.norm(y.reshape(y.shape[0], 128, 32).transpose(1, 2).reshape(y.shape[0], 64, 64)),
    ],
    ids=["others take it", "tokens", "channels are mixed"],
)
def test_a_norm_of_anything_else_is_not(mixed):
    layers = {"linear": nn.Linear(3, 64), "norm": nn.BatchNorm1d(64)}
    network = quantized(Applied(lambda net, x: mixed(net, net.linear(x.flatten(2).transpose(1, 2))), **layers), bits=[(8, 8)])
    integer = integer_network(network, images())
    assert any(norm_arguments(node) for node in integer.module.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(integer.module(images(3)), network(images(3)), rtol=1e-3, atol=1e-3)
