import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import (
    centered,
    integer_network,
    unsigned_grid,
)
from bitscape.exporters.integer.graph import ActivationGrid, is_quantizer
from bitscape.exporters.integer.placement import float_reads
from bitscape.models.named_outputs import named_outputs
from bitscape.quant.layers import quantized_layers
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor
from tests.exporters.networks import OUTPUTS_OF_HEADS, ZOO, Applied, SameConv2d, StandardConv2d, head, images, integers, made, quantized
from tests.networks import conv_norm

pytestmark = pytest.mark.slow

QUANTIZERS = [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(restore_scale=False), Liq()]
aten = torch.ops.aten


def grid(scale=0.1, zero_point=0.0, qmin=0, qmax=255) -> ActivationGrid:
    return ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)


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
            (grid(zero_point=-128.0, qmax=127), grid(zero_point=0.0, qmin=128, qmax=255)),
        ],
    )
    def test_codes_become_bytes(self, given, expected):
        assert unsigned_grid(given) == expected

    def test_what_no_byte_can_hold_is_refused(self):
        with pytest.raises(BitscapeError, match=r"one signed bit have no zero.*give the layer 2 bits"):
            unsigned_grid(grid(zero_point=-0.5, qmin=-1, qmax=0))

    @pytest.mark.parametrize(
        ("given", "needed"),
        [
            (grid(zero_point=-0.6), 257),
            (grid(zero_point=-3.2), 259),
            (grid(zero_point=256.0), 257),
            (grid(zero_point=-255.0, qmax=15), 271),
        ],
    )
    def test_levels_too_far_from_zero_for_a_byte_are_refused_instead_of_cut(self, given, needed):
        with pytest.raises(BitscapeError, match=rf"activation levels .*both take {needed} codes, .* have 256; give its input fewer bits"):
            unsigned_grid(given)

    def test_the_layer_of_such_levels_is_named(self):
        body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), SameConv2d(4, 4, 2), nn.Flatten(), nn.Linear(256, 2))
        network = quantized(nn.Sequential(body), bits=[(8, 8)], quantizer=LsqPlus())
        quantizer = quantized_layers(network)["0.2"].input_quantizer
        with torch.no_grad():
            quantizer.offset.copy_(3 * quantizer.scale)  # as training may leave it
        with pytest.raises(BitscapeError, match=r"^layer 0\.2: its 256 activation levels .*both take 259 codes"):
            integer_network(network, images())

    def test_a_layer_with_one_bit_of_signed_input_is_refused(self):
        with pytest.raises(BitscapeError, match=r"^layer 0: activations of one signed bit"):
            integer_network(quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), bits=[(4, 1)]), images())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_structure_keeps_what_it_computes(name):
    """At 8 bits the added quantizers round finely: whatever is misplaced, or has a wrong scale, shows."""
    network, integer = integers(name)
    with torch.no_grad():
        found, expected = named_outputs(integer.module(images())), named_outputs(network(images()))
    assert list(found) == list(expected)
    for output, values in expected.items():
        assert (found[output] - values).norm() < 0.03 * values.norm()


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
        with caplog.at_level(logging.WARNING, "bitscape.exporters"):
            integer = integer_network(network, images())
        assert set(integer.weights) == {"0.weight", "10.weight"}
        assert [record.args for record in caplog.records] == [("2",), ("4",), ("6",)]
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.02, atol=0.02)

    def test_a_layer_whose_input_is_the_same_for_every_image_gives_way_to_its_output(self, caplog):
        def forward(net, x):
            bias = net.late(net.early(net.table.weight).relu())
            return net.head(net.stem(x).relu().mean((2, 3)) + bias)

        layers = {"stem": nn.Conv2d(3, 8, 3), "table": nn.Embedding(1, 4), "early": nn.Linear(4, 6), "late": nn.Linear(6, 8)}
        network = quantized(made(lambda: Applied(forward, **layers, head=nn.Linear(8, 5))), bits=[(8, 8)])
        with caplog.at_level(logging.WARNING, "bitscape.exporters"):
            integer = integer_network(network, images())
        assert set(integer.weights) == {"stem.weight", "head.weight"}
        assert [record.args for record in caplog.records] == [("early",), ("late",)]
        linears = [node for node in integer.module.graph.nodes if node.target is torch.ops.aten.linear.default]
        assert len(linears) == 1
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.02, atol=0.02)

    def test_a_layer_of_images_and_of_a_table_stays_one_of_integers(self):
        def forward(net, x):
            return net.head(net.q(net.stem(x).relu().mean((2, 3))) + net.q(net.table.weight))

        layers = {"stem": nn.Conv2d(3, 8, 3), "table": nn.Embedding(1, 8), "q": nn.Linear(8, 8), "head": nn.Linear(8, 5)}
        network = quantized(made(lambda: Applied(forward, **layers)), bits=[(8, 8)])
        integer = integer_network(network, images())
        assert set(integer.weights) == {"stem.weight", "q.weight", "head.weight"}
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.02, atol=0.02)

    def test_a_layer_whose_forward_changes_the_bias_stays_float(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return F.linear(x, self.weight, self.bias * 2)

        network = quantized(made(lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), Doubled(4, 6), nn.Linear(6, 5))), bits=[(8, 8)])
        integer = integer_network(network, images())
        assert set(integer.weights) == {"0.weight", "3.weight"}
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.02, atol=0.02)

    def test_a_network_without_a_layer_of_integers_is_refused(self):
        network = quantized(nn.Sequential(StandardConv2d(3, 4, 8), nn.Flatten()), bits=[(8, 8)])
        with pytest.raises(BitscapeError, match="none of its layers can be computed in integers"):
            integer_network(network, images())

    def test_norms_behind_attention_and_tables_can_be_folded(self):
        def forward(net, x):
            tokens = net.patches(x).flatten(2).mT
            tokens = F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None]).squeeze(1)
            tokens = net.norm(net.mix(tokens).reshape(-1, 8)).reshape(x.shape[0], -1, 8)
            return net.head((tokens + net.late(net.early(net.table.weight).reshape(-1, 8))).mean(1))

        layers = {"patches": nn.Conv2d(3, 8, 4, 4), "mix": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8), "table": nn.Embedding(1, 8)}
        layers |= {"early": nn.Linear(8, 8), "late": nn.BatchNorm1d(8), "head": nn.Linear(8, 5)}
        network = quantized(made(lambda: Applied(forward, **layers)), bits=[(8, 8)])
        integer = integer_network(network, images())
        with torch.no_grad():
            torch.testing.assert_close(integer.module(images()), network(images()), rtol=0.05, atol=0.05)


class TestCalibration:
    def test_added_quantizers_have_the_ranges_of_the_folded_network(self):
        last = [nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 2)]
        network = quantized(nn.Sequential(*conv_norm(3, 8, 3), nn.SiLU(), *last), bits=[(8, 8)])
        integer = integer_network(network, images(), MinMax())
        with torch.no_grad():
            inner, outer = network[:2](images()), network[:4](images())
        assert list(integer.added) == ["conv2d", "conv2d_1"]
        for found, values in zip(integer.added.values(), (inner, outer), strict=True):
            assert (found.qmin, found.qmax) == (0, 255)
            scale = float(values.max() - values.min()) / 255
            assert found.zero_point == pytest.approx(-float(values.min()) / scale, abs=1)
            assert found.scale == pytest.approx(scale, rel=0.01)

    def test_tensors_without_values_below_zero_have_all_codes_above(self):
        last = [nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(144, 2)]
        network = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sigmoid(), *last), bits=[(8, 8)])
        integer = integer_network(network, images(), MinMax())
        positive, signed = (found.zero_point for found in integer.added.values())
        assert positive == 0 and 0 < signed < 255

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


def test_outputs_are_as_fine_as_the_networks():
    """The convolutions that end a network have the results that the simulation has, and thousands of values."""
    network, integer = integers("heads")
    with torch.no_grad():
        found, expected = integer.module(images()), named_outputs(network(images()))
    assert tuple(found) == OUTPUTS_OF_HEADS == tuple(expected)
    for name in ("heads.0", "heads.1", "masks", "relu"):
        assert len(found[name].unique()) > 0.5 * len(expected[name].unique()) > 1000, name
        assert (found[name] - expected[name]).norm() < 2e-3 * expected[name].norm(), name
    assert torch.equal(found["pixels"], images()) and torch.equal(found["anchors"], expected["anchors"])


def test_every_layer_reads_codes_and_every_convolution_makes_some_or_an_output():
    for name in ZOO:
        _, integer = integers(name)
        for node in integer.module.graph.nodes:
            if str(getattr(node.args[1], "target", "") if len(node.args) > 1 else "") in integer.weights:
                source = node.args[0]
                assert is_quantizer(source) or is_quantizer(source.args[0]), (name, node)  # zero padding may stand between
                if "conv" in str(node.target):
                    reads = float_reads(integer.module.graph)
                    assert all(is_quantizer(taker) or (node, taker) in reads for taker in node.users), (name, node)


def test_images_that_are_not_finite_are_named():
    broken = images(8)
    broken[5, 0, 0, 0] = torch.nan
    with pytest.raises(BitscapeError, match=r"images, behind the network's operators: .* are NaN or infinite"):
        integer_network(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), *head(4)), bits=[(8, 8)]), broken)


def test_a_network_that_takes_indices_becomes_integers():
    torch.manual_seed(0)
    indices = torch.arange(12).reshape(4, 3) % 5
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    network = quantized(network, indices, bits=[(8, 8)])
    result = integer_network(network, indices)
    assert set(result.weights) == {"1.weight", "4.weight"}
    torch.testing.assert_close(result.module(indices), network(indices), rtol=0, atol=0.02)


def test_a_network_that_autocasts_within_its_forward_is_told_so():
    class Autocasting(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    with pytest.raises(BitscapeError, match="because it autocasts within its forward: export it without autocast"):
        integer_network(quantized(Autocasting(nn.Conv2d(3, 4, 3), *head(4)), bits=[(8, 8)]), images())


def test_16_bit_codes_of_either_kind_get_their_zero_in_the_middle() -> None:
    signed = ActivationGrid(scale=0.5, zero_point=32768.0, qmin=0, qmax=65535)
    assert centered(signed) == signed
    narrow = ActivationGrid(scale=0.5, zero_point=0.0, qmin=0, qmax=255)
    assert centered(narrow) == narrow
    unsigned = ActivationGrid(scale=0.5, zero_point=0.0, qmin=0, qmax=65535)
    assert centered(unsigned) == ActivationGrid(scale=1.0, zero_point=32768.0, qmin=32768, qmax=65535)


def test_for_runtimes_of_integers_alone_every_tensor_is_quantized() -> None:
    network = integer_network(quantized(made(ZOO["excited"]), bits=[(8, 8)]), images(), integers_only=True)
    nodes = network.module.graph.nodes
    floats = [node.name for node in nodes if node.target in (torch.ops.aten.silu.default, torch.ops.aten.mul.Tensor)]
    assert floats
    for node in nodes:
        if node.name in floats or node.op == "placeholder":
            users = [user for user in node.users if user.target is not torch.ops.aten.sym_size.int]
            assert len(users) == 1 and is_quantizer(users[0])
        if node.op == "output":
            assert all(is_quantizer(end) for end in node.all_input_nodes)
