import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import ActivationGrid, activation_grid, export_program, grid_of, is_quantizer, layer_of, quiet, trace
from bitscape.exporters.integer.interface import Interface
from bitscape.policy import LayerBits
from bitscape.quant.convert import with_quantizers
from bitscape.quant.functional import fake_quantize
from bitscape.quant.grid import grid
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor
from bitscape.quant.quantizers.lsq import LsqActivation
from bitscape.quant.quantizers.pact import PactActivation
from tests.exporters.networks import Applied, images, policy_for, quantized

pytestmark = pytest.mark.slow

QUANTIZERS = [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(), Liq()]


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


@pytest.mark.parametrize(("zero_point", "expected"), [(0.0, [-2, -2, 0, 0, 2, 2, 2]), (128.0, [126, 126, 128, 128, 130, 130, 130])])
def test_codes_round_half_to_even_before_a_whole_zero_point_is_added(zero_point, expected):
    points = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4])
    codes = ActivationGrid(scale=1.0, zero_point=zero_point, qmin=-200, qmax=255).quantize(points)
    assert codes.tolist() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_a_grid_computes_what_the_fake_quantizer_does(bits, signed):
    x = torch.linspace(-3, 3, 10001)
    scale, limits = torch.tensor(0.0371), grid(bits, signed=signed)
    found = ActivationGrid(scale=float(scale), zero_point=limits.zero_point, qmin=int(limits.qmin), qmax=int(limits.qmax))
    assert torch.equal(found.dequantize(found.quantize(x)), fake_quantize(x, scale, limits))


class NoReturn(nn.Sequential):
    """Its `train`, and so its `eval`, returns nothing."""

    def train(self, mode=True):
        super().train(mode)


def test_a_train_method_that_returns_nothing_is_no_obstacle():
    network = NoReturn(*quantized(small()))
    module = trace(network, images(2)).module
    network.eval()
    with torch.no_grad():
        assert torch.equal(module(images(3)), network(images(3)))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_the_traced_network_computes_the_same_for_every_batch_size(quantizer):
    network = quantized(small(), quantizer=quantizer)
    before, training = copy.deepcopy(network.state_dict()), network.training
    traced = trace(network, images(2))
    with torch.no_grad():
        for n in (1, 2, 7):
            assert torch.equal(traced.module(images(n)), network(images(n)))
    assert network.training == training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    layers = quantized_layers(network)
    assert traced.bits == {f"{name}.weight": static_bits(layer) for name, layer in layers.items()}
    for key, codes in traced.codes.items():
        assert torch.equal(traced.module.get_parameter(key), codes.dequantize())


def test_a_network_in_training_mode_is_traced_as_it_evaluates():
    network = quantized(small()).train()
    traced = trace(network, images(2))
    assert network.training
    assert torch.equal(traced.module(images(3)), network.eval()(images(3)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_of_pact_ends_where_pact_clips(bits):
    quantizer = PactActivation(bits, decay=0.0)
    quantizer.initialize(torch.tensor([-1.0, 1.0]), MinMax())
    found, x = activation_grid(quantizer), torch.linspace(-2, 2, 4001)
    assert (found.qmin, found.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert torch.equal(found.dequantize(found.quantize(x)), quantizer(x).detach())


def test_a_layer_of_several_names_goes_by_its_first():
    shared = nn.Conv2d(3, 3, 1)
    network = quantized(nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 2)))
    traced = trace(network, images(2))
    assert set(traced.codes) == {"0.weight", "4.weight"}
    layers = [traced.weight_name(node) for node in traced.module.graph.nodes if traced.is_layer(node)]
    assert layers == ["0.weight", "0.weight", "4.weight"]
    assert torch.equal(traced.module(images()), network(images()))


def test_layers_that_share_a_parameter_have_their_own_codes():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight, second.bias = first.weight, first.bias
    network = quantized(nn.Sequential(first, nn.ReLU(), second), bits=[(2, 8), (8, 8)])
    traced = trace(network, images(2))
    assert int(traced.codes["0.weight"].q.abs().max()) <= 2 < int(traced.codes["2.weight"].q.abs().max())
    assert torch.equal(traced.module(images()), network(images()))


def test_a_layer_that_never_runs_is_no_obstacle():
    network = quantized(Applied(lambda net, x: net.used(x), used=nn.Conv2d(3, 2, 1), unused=nn.Conv2d(3, 2, 1)))
    assert set(trace(network, images(2)).codes) == {"used.weight"}


def test_a_layer_that_ran_only_in_calibration_is_named(caplog):
    network = quantized(Applied(lambda net, x: net.used(x) + net.aside(x), used=nn.Conv2d(3, 2, 1), aside=nn.Conv2d(3, 2, 1)))
    network.function = lambda net, x: net.used(x)
    with caplog.at_level(logging.WARNING, "bitscape.exporters"):
        assert set(trace(network, images(2)).codes) == {"used.weight"}
    assert "aside.weight" in caplog.text


def test_every_input_quantizer_is_one_node():
    network = quantized(small(), bits=[(8, 8), (3, 4), (8, 2)])
    traced = trace(network, images(2))
    grids = [grid_of(node) for node in traced.module.graph.nodes if is_quantizer(node)]
    expected = [layer.input_quantizer.grid for layer in quantized_layers(network).values()]
    assert [(g.qmin, g.qmax) for g in grids] == [(int(g.qmin), int(g.qmax)) for g in expected]
    assert [g.qmax - g.qmin for g in grids] == [255, 15, 3]


def test_bits_that_differ_are_refused_with_the_layer_named():
    network = quantized(small())
    network[3].input_quantizer = LsqActivation(torch.tensor([4, 8]).reshape(2, 1, 1, 1))
    network[3].input_quantizer.initialized = True
    with pytest.raises(BitscapeError, match=r"layer 3: its input quantizer .* static policy"):
        trace(network, images(2))
    network = quantized(small())
    network[3].weight_quantizer.bits = torch.tensor([4] * 8).reshape(8, 1, 1, 1)
    with pytest.raises(BitscapeError, match=r"layer 3: its weight quantizer .* static policy"):
        trace(network, images(2))


def test_weights_without_codes_are_refused_with_the_layer_named():
    network = quantized(small())
    with torch.no_grad():
        network[3].weight[0] = torch.nan
    with pytest.raises(BitscapeError, match=r"layer 3: .*9 values NaN or infinite"):
        trace(network, images(2))


def test_networks_that_cannot_be_traced_are_refused():
    float_network = small()
    with pytest.raises(BitscapeError, match=r"no quantized layer; call bitscape\.quantize"):
        trace(float_network, images(2))
    with pytest.raises(BitscapeError, match=r"layer 0: its input scale is not set: call bitscape\.quantize"):
        trace(with_quantizers(float_network, policy_for(float_network)), images(2))
    network = quantized(small())
    with pytest.raises(BitscapeError, match="example: 1 images; give two at least"):
        trace(network, images(1))
    with pytest.raises(BitscapeError, match=r"example: shape \(0, .*give at least one image"):
        trace(network, images(0))
    with pytest.raises(BitscapeError, match=r"fails on a batch of shape \(2, 4, 8, 8\)"):
        trace(network, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [lambda net, x: net.conv(x) if x.sum() > 0 else -net.conv(x), lambda net, x: net.conv(x).reshape(len(x), -1)],
    ids=["a branch on values", "len"],
)
def test_a_forward_that_cannot_be_followed_is_refused_with_advice(forward):
    network = quantized(Applied(forward, conv=nn.Conv2d(3, 2, 1)))
    with pytest.raises(BitscapeError, match=r"cannot follow its forward \(\w+: .*\); write it without branches on values and with x.shape"):
        trace(network, images(2))


def test_a_float_network_that_cannot_be_followed_is_refused_without_advice_on_quantized_ones():
    network = Applied(lambda net, x: net.conv(x) if x.sum() > 0 else -net.conv(x), conv=nn.Conv2d(3, 2, 1)).eval()
    with (
        quiet(),
        torch.no_grad(),
        pytest.raises(BitscapeError, match=r"cannot follow its forward \(\w+: .*\); .* x\.shape\[0\] for len\(x\)$"),
    ):
        export_program(network, Interface.of(network, Samples.of(images(2))), images(2))


@pytest.mark.parametrize(("weight", "layer"), [("weight", ""), ("conv.weight", "conv"), ("a.weight.weight", "a.weight")])
def test_names_of_layers(weight, layer):
    assert layer_of(weight) == layer


def test_bits_of_a_layer_are_those_of_the_policy():
    traced = trace(quantized(small(), bits=[(5, 6), (1, 3), (7, 2)]), images(2))
    assert list(traced.bits.values()) == [LayerBits(5, 6), LayerBits(1, 3), LayerBits(7, 2)]


def test_loggers_are_restored_after_an_error():
    logger = logging.getLogger("torch.export")
    before = logger.level
    with pytest.raises(RuntimeError), quiet():
        assert logger.level == logging.ERROR
        raise RuntimeError
    assert logger.level == before


def test_functional_forms_keep_values_apart():
    """In-place operators become functional ones: what was there before stays readable."""

    def forward(net, x):
        x = net.conv(x)
        return F.relu_(x) + x.add_(1.0)

    network = quantized(Applied(forward, conv=nn.Conv2d(3, 2, 1)))
    with torch.no_grad():
        assert torch.equal(trace(network, images(2)).module(images(3)), network(images(3)))


def test_padding_by_nothing_is_left_out():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, [0, 0, 0, 0]))

    network = quantized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Padded(8, 8, 1), nn.Flatten(), nn.Linear(512, 5)))
    traced = trace(network, images(2))
    assert not [node for node in traced.module.graph.nodes if "pad" in str(node.target)]
    with torch.no_grad():
        assert torch.equal(traced.module(images(3)), network(images(3)))


def test_views_become_reshapes():
    network = quantized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 5)))
    targets = {str(node.target) for node in trace(network, images(2)).module.graph.nodes}
    assert "aten.reshape.default" in targets and "aten.view.default" not in targets
