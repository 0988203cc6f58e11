import logging

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from bitscape.errors import BitscapeError
from bitscape.export.graph import FAKE_QUANTIZE, ActivationGrid, grid_of, is_quantizer, set_grid
from bitscape.export.integer_graph import (
    LARGEST_BIAS,
    IntegerWeight,
    _absorb_rectifiers,
    _integer_weight,
    _loosen,
    bias_name,
    input_scale,
    integer_network,
    uint8_grid,
)
from bitscape.quant.layers import quantized_layers
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor
from bitscape.quant.quantizers.base import Codes
from tests.export.networks import ZOO, Applied, SameConv2d, StandardConv2d, head, images, integers, quantized
from tests.networks import conv_norm

QUANTIZERS = [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(restore_scale=False), Liq()]
aten = torch.ops.aten


def grid(scale=0.1, zero_point=0.0, qmin=0, qmax=255) -> ActivationGrid:
    return ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)


def weights_in(codes: list[int], scale: list[float]) -> IntegerWeight:
    return IntegerWeight(torch.tensor(codes, dtype=torch.int16), torch.tensor(scale))


class TestWeights:
    @pytest.mark.parametrize(
        ("codes", "bits"),
        [([0], 1), ([-1, 0], 1), ([1], 2), ([-2, 1], 2), ([-3], 3), ([2], 3), ([-8, 7], 4), ([8], 5), ([-9], 5), ([-128, 127], 8)],
    )
    def test_bits_are_those_of_twos_complement(self, codes, bits):
        assert weights_in(codes, [1.0] * len(codes)).bits == bits

    @pytest.mark.parametrize("bits", range(1, 8))
    def test_levels_without_a_zero_become_odd_integers_of_half_the_scale(self, bits):
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).reshape(1, -1).expand(3, -1)
        codes = Codes(q, torch.tensor([0.3, 0.7, 1e-5]).reshape(3, 1), -0.5)
        weight = _integer_weight("w", codes)
        assert torch.equal(weight.dequantize(), codes.dequantize())
        assert weight.q[0].tolist() == list(range(1 - 2**bits, 2**bits, 2))
        assert weight.bits == bits + 1

    def test_levels_without_a_zero_at_8_bits_are_refused(self):
        with pytest.raises(BitscapeError, match=r"conv\.weight: .* 9-bit integers; give the layer 7 bits"):
            _integer_weight("conv.weight", Codes(torch.tensor([[127]], dtype=torch.int8), torch.tensor(1.0), -0.5))
        with pytest.raises(BitscapeError, match="9-bit integers"):
            integer_network(quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), bits=[(8, 8)], quantizer=Dorefa()), images())

    def test_one_scale_is_that_of_every_channel(self):
        weight = _integer_weight("w", Codes(torch.zeros(4, 2, 1, 1, dtype=torch.int8), torch.tensor(0.25), 0.0))
        assert weight.scale.tolist() == [0.25] * 4


class TestGrids:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (grid(qmin=-128, qmax=127), grid(zero_point=128.0)),
            (grid(qmin=-2, qmax=1), grid(zero_point=128.0, qmin=126, qmax=129)),
            (grid(qmin=-7, qmax=7), grid(zero_point=128.0, qmin=121, qmax=135)),
            (grid(qmax=1), grid(qmax=1)),
            (grid(qmax=255), grid()),
            (grid(zero_point=17.4), grid(zero_point=17.0)),
            (grid(zero_point=17.6, qmax=15), grid(zero_point=18.0, qmax=15)),
            (grid(zero_point=-3.2, qmax=15), grid(zero_point=0.0, qmin=3, qmax=18)),  # it begins above zero
            (grid(zero_point=-3.2, qmax=255), grid(zero_point=0.0, qmin=3, qmax=255)),
        ],
    )
    def test_codes_become_bytes(self, given, expected):
        assert uint8_grid(given) == expected

    def test_what_no_byte_can_hold_is_refused(self):
        with pytest.raises(BitscapeError, match=r"one signed bit have no zero.*give the layer 2 bits"):
            uint8_grid(grid(zero_point=-0.5, qmin=-1, qmax=0))
        for zero_point in (256.0, -255.0):
            with pytest.raises(BitscapeError, match="too far from zero"):
                uint8_grid(grid(zero_point=zero_point))

    def test_a_layer_with_one_bit_of_signed_input_is_refused(self):
        with pytest.raises(BitscapeError, match="one signed bit"):
            integer_network(quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), bits=[(4, 1)]), images())


def behind_rectifiers(quantizer: ActivationGrid, *rectifiers) -> tuple[fx.GraphModule, fx.GraphModule]:
    """x -> rectifiers -> quantizer, as it is and with the rectifiers absorbed."""

    def build() -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        for target, *settings in rectifiers:
            x = graph.call_function(target, (x, *settings))
        node = graph.call_function(FAKE_QUANTIZE, (x, 1.0, 0.0, 0, 255))
        set_grid(node, quantizer)
        graph.output(node)
        return fx.GraphModule({}, graph)

    plain, absorbed = build(), build()
    _absorb_rectifiers(absorbed.graph)
    absorbed.graph.eliminate_dead_code()
    absorbed.recompile()
    return plain, absorbed


RECTIFIERS = [
    [(aten.relu.default,)],
    [(aten.relu6.default,)],
    [(aten.hardtanh.default,)],
    [(aten.hardtanh.default, 0.0, 6.0)],
    [(aten.hardtanh.default, -2, 2)],
    [(aten.clamp.default, 0)],
    [(aten.clamp.default, None, 1.5)],
    [(aten.clamp.default, 0.5, 1.5)],
    [(aten.clip.default, -0.25, None)],
    [(aten.clamp_min.default, 0.3)],
    [(aten.relu.default,), (aten.clamp.default, None, 3.0)],
]
GRIDS = [grid(), grid(qmax=15), grid(0.0213, 128.0), grid(0.31, 128.0, 126, 129), grid(0.05, 37.0), grid(6 / 255), grid(0.04, 0.0, 2, 9)]


class TestRectifiers:
    @pytest.mark.parametrize("rectifiers", RECTIFIERS, ids=str)
    @pytest.mark.parametrize("quantizer", GRIDS, ids=str)
    def test_quantizers_cut_off_exactly_what_rectifiers_do(self, rectifiers, quantizer):
        plain, absorbed = behind_rectifiers(quantizer, *rectifiers)
        targets = [node.target for node in absorbed.graph.nodes if node.op == "call_function"]
        assert targets == [FAKE_QUANTIZE]
        edges = (torch.arange(-3, 260) - quantizer.zero_point + 0.5) * quantizer.scale  # between any two codes, and next to it
        x = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1), torch.linspace(-9, 9, 2001)])
        assert torch.equal(plain(x), absorbed(x))

    def test_a_rectifier_that_others_need_stays_for_them(self):
        graph = fx.Graph()
        relu = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
        node = graph.call_function(FAKE_QUANTIZE, (relu, 1.0, 128.0, 0, 255))
        graph.output((node, relu))
        _absorb_rectifiers(graph)
        assert list(relu.users) == [next(iter(graph.find_nodes(op="output")))] and grid_of(node).qmin == 128

    @pytest.mark.parametrize(
        ("rectifier", "source", "needed"),
        [
            (aten.relu.default, grid(), False),
            (aten.relu.default, grid(zero_point=128.0), True),
            (aten.relu.default, grid(zero_point=128.0, qmin=128), False),
            (aten.relu6.default, grid(6 / 255), False),
            (aten.relu6.default, grid(6.1 / 255), True),
            (aten.relu6.default, grid(6.1 / 255, qmax=250), False),
            (aten.hardtanh.default, grid(1 / 127, 128.0, 1), False),
            (aten.hardtanh.default, grid(1 / 127, 128.0), True),
        ],
    )
    def test_one_behind_a_quantizer_goes_if_it_cuts_off_nothing(self, rectifier, source, needed):
        graph = fx.Graph()
        node = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 1.0, 0.0, 0, 255))
        set_grid(node, source)
        graph.output(graph.call_function(rectifier, (graph.call_function(aten.view.default, (node, [-1])),)))
        _absorb_rectifiers(graph)
        graph.eliminate_dead_code()
        assert (rectifier in {node.target for node in graph.nodes}) is needed

    def test_padding_between_may_bring_a_zero_that_the_grid_lacks(self):
        graph = fx.Graph()
        node = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 0.1, 0.0, 5, 255))
        padded = graph.call_function(aten.constant_pad_nd.default, (node, [1, 1]))
        graph.output(graph.call_function(aten.clamp_min.default, (padded, 0.5)))
        _absorb_rectifiers(graph)
        assert aten.clamp_min.default in {node.target for node in graph.nodes if node.users}


class TestLimits:
    """Limits of quantizers that repeat others'."""

    def limits(self, first: ActivationGrid, second: ActivationGrid, between=()) -> tuple[int, int]:
        graph = fx.Graph()
        x = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 1.0, 0.0, 0, 255))
        set_grid(x, first)
        for target, *settings in between:
            x = graph.call_function(target, (x, *settings))
        again = graph.call_function(FAKE_QUANTIZE, (x, 1.0, 0.0, 0, 255))
        set_grid(again, second)
        _loosen(graph)
        return grid_of(again).qmin, grid_of(again).qmax

    def test_the_second_of_two_equal_ones_cuts_off_nothing(self):
        few = grid(qmax=15)
        assert self.limits(few, few) == (0, 255)
        moved = [(aten.view.default, [-1]), (aten.constant_pad_nd.default, [1, 1])]
        assert self.limits(few, few, moved) == (0, 255)
        assert self.limits(grid(qmax=7), few) == (0, 255)

    def test_it_keeps_limits_that_cut(self):
        few = grid(qmax=15)
        assert self.limits(grid(), few) == (0, 15)
        assert self.limits(grid(scale=0.2, qmax=15), few) == (0, 15)
        assert self.limits(grid(zero_point=1.0, qmax=15), few) == (0, 15)
        assert self.limits(few, few, [(aten.sigmoid.default,)]) == (0, 15)
        above = grid(qmin=3, qmax=15)
        assert self.limits(above, above) == (3, 15)  # padding might bring zeros in

    def test_all_parts_of_a_concatenation_count(self):
        for parts, expected in (([grid(qmax=15)] * 2, (0, 255)), ([grid(qmax=15), grid()], (0, 15))):
            graph = fx.Graph()
            nodes = [graph.call_function(FAKE_QUANTIZE, (graph.placeholder(name), 1.0, 0.0, 0, 255)) for name in "ab"]
            for node, part in zip(nodes, parts, strict=True):
                set_grid(node, part)
            again = graph.call_function(FAKE_QUANTIZE, (graph.call_function(aten.cat.default, (nodes, 1)), 1.0, 0.0, 0, 255))
            set_grid(again, grid(qmax=15))
            _loosen(graph)
            assert (grid_of(again).qmin, grid_of(again).qmax) == expected


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
        assert [str(node.args[1]) for node in norms] == ["norm_weight", "second_weight", "in_front_weight"]

    def test_scales_are_those_of_the_layer_times_gamma_over_sigma(self, folded):
        network, integer = folded
        norm = network.biased[1]
        layer = quantized_layers(network)["biased.0"]
        codes = _integer_weight("w", layer.weight_quantizer.codes(layer.weight))
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
        assert set(folded[1].biases) == {f"{name}.weight" for name in ("plain.0", "biased.0", "linear", "shared", "twice", "last")}

    def test_the_simulation_is_near_the_network(self, folded):
        network, integer = folded
        with torch.no_grad():
            for found, expected in zip(integer.module(images()), network(images()), strict=True):
                assert (found - expected).norm() < 0.12 * expected.norm()  # 4 bits: one code more or less moves the layers behind


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_structure_keeps_what_it_computes(name):
    """At 8 bits the added quantizers round finely: whatever is misplaced, or has a wrong scale, shows."""
    network, integer = integers(name)
    with torch.no_grad():
        found, expected = integer.module(images()), network(images())
    if isinstance(found, tuple):
        found, expected = found[0], expected[0]
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_where_nothing_is_added_the_simulation_is_the_network_exactly():
    def forward(net, x):
        x = F.relu6(net.b(F.max_pool2d(F.relu(net.a(x)), 2)))
        return net.d(F.hardtanh(net.c(x)).flatten(1))

    layers = {"b": SameConv2d(8, 8, 2, bias=False), "c": nn.Conv2d(8, 4, 1, bias=False), "d": nn.Linear(64, 3, bias=False)}
    network = Applied(forward, a=nn.Conv2d(3, 8, 3, padding=1, bias=False), **layers)
    for quantizer in (Lsq(), Pact(), Liq()):
        ready = quantized(network, bits=[(3, 8), (5, 4)], quantizer=quantizer)
        integer = integer_network(ready, images())
        assert not integer.added and not integer.biases
        with torch.no_grad():
            assert torch.equal(integer.module(images(9, seed=4)), ready(images(9, seed=4)))


class TestBiases:
    def integer(self, scales: list[float], biases: list[float]):
        torch.manual_seed(0)
        network = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2)), bits=[(8, 8)])
        with torch.no_grad():
            network[1].weight.copy_(torch.tensor(scales) * (network[1].running_var + network[1].eps).sqrt())
            network[1].bias.copy_(torch.tensor(biases))
            network[1].running_mean.zero_()
            network[0].bias.zero_()
            network[0].weight[:, 0] = -1.0  # a code of -128 somewhere
            network[0].weight_quantizer.scale.fill_(1 / 128)
        return network, integer_network(network, images())

    def test_a_bias_that_32_bits_cannot_hold_widens_the_spacing_of_its_channel_alone(self):
        _, plain = self.integer([1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
        _, integer = self.integer([1.0, -1.0, -1e-9, 1e-9], [1.0, 1.0, 50.0, -50.0])
        weight, biases = integer.weights["0.weight"], integer.biases["0.weight"]
        assert torch.equal(weight.q[:2], plain.weights["0.weight"].q[:2])  # a negative scale keeps its sign, and -128 its code
        assert torch.equal(weight.scale[:2], plain.weights["0.weight"].scale[:2])
        assert weight.q.min() == -128 and weight.q.abs().max() <= 128
        assert biases.abs().max() <= LARGEST_BIAS + 64 and biases.abs()[2:].min() > 2**29
        spacing = weight.scale * input_scale(integer.module.graph, "0.weight")
        torch.testing.assert_close((biases * spacing)[2:], torch.tensor([50.0, -50.0]), rtol=1e-6, atol=0)
        assert weight.scale[2] < 0 < weight.scale[3]

    def test_layers_may_share_a_bias(self):
        a, b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        b.bias = a.bias
        network = quantized(nn.Sequential(a, nn.ReLU(), b, nn.Flatten(), nn.Linear(192, 2, bias=False)), bits=[(8, 8)])
        integer = integer_network(network, images())
        assert {bias_name(key) for key in integer.biases} == {"0.bias", "2.bias"}
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.01, atol=0.01)


class TestFloatLayers:
    def test_a_layer_whose_forward_changes_weight_or_input_stays_float(self, caplog):
        class Gain(nn.Conv2d):
            def forward(self, x):
                return super().forward(x * 1.5)

        class Weighted(nn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight * self.gain, self.bias)

        odd = [StandardConv2d(4, 4, 1), nn.ReLU(), Gain(4, 4, 1), nn.ReLU(), Weighted(4, 4, 1), nn.ReLU()]
        odd[4].gain = 2.0
        network = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *odd, *head(4)), bits=[(8, 8)])
        with caplog.at_level(logging.WARNING, "bitscape.export"):
            integer = integer_network(network, images())
        assert set(integer.weights) == {"0.weight", "10.weight"}
        assert [record.args for record in caplog.records] == [("2.weight",), ("4.weight",), ("6.weight",)]
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.02, atol=0.02)


class TestCalibration:
    def test_added_quantizers_have_the_ranges_of_the_folded_network(self):
        network = quantized(nn.Sequential(*conv_norm(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten()), bits=[(8, 8)])
        integer = integer_network(network, images(), MinMax())
        with torch.no_grad():
            inner, outer = network[1](network[0](images())), network(images())
        assert list(integer.added) == ["conv2d", "conv2d_1"]
        for found, values in zip(integer.added.values(), (inner, outer), strict=True):
            assert (found.zero_point, found.qmin, found.qmax) == (128.0, 0, 255)
            torch.testing.assert_close(found.scale, float(max(values.max() / 127, -values.min() / 128)), rtol=0.01, atol=0)

    def test_tensors_without_values_below_zero_have_all_codes_above(self):
        network = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sigmoid(), nn.Conv2d(8, 4, 1), nn.Flatten()), bits=[(8, 8)])
        integer = integer_network(network, images(), MinMax())
        assert [found.zero_point for found in integer.added.values()] == [0.0, 128.0]

    def test_all_images_count_whatever_their_order_and_batch(self):
        network = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten()), bits=[(8, 8)])
        x = torch.cat([images(70, seed=5), 5 * images(1, seed=6)])
        scales = {float(integer_network(network, given, MinMax()).added["conv2d"].scale) for given in (x, x.flip(0))}
        small = float(integer_network(network, x[:70], MinMax()).added["conv2d"].scale)
        assert len(scales) == 1 and scales.pop() > small

    def test_the_same_network_gives_the_same_integers(self):
        network = quantized(nn.Sequential(*conv_norm(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten()))
        first, second = (integer_network(network, images(200)) for _ in range(2))
        assert first.added == second.added
        assert all(torch.equal(first.biases[key], second.biases[key]) for key in first.biases)


def test_every_layer_reads_codes_and_every_convolution_makes_some():
    for name in ZOO:
        _, integer = integers(name)
        for node in integer.module.graph.nodes:
            if str(getattr(node.args[1], "target", "") if len(node.args) > 1 else "") in integer.weights:
                source = node.args[0]
                assert is_quantizer(source) or is_quantizer(source.args[0]), (name, node)  # zero padding may stand between
                if "conv" in str(node.target):
                    (taker,) = node.users
                    assert is_quantizer(taker), (name, node)
