import math

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.quant.quantizers import Dorefa, LsqPlus
from bitscape.tuning.relaxed import CodesAndScales, Reach, relaxed
from tests.tuning.small import float_net, images, quantized

REACH = Reach(scales=0.1, codes=0.5)


def test_a_network_that_was_not_trained_comes_back_as_it_was():
    network = quantized(float_net())
    network[0].weight.requires_grad_(False)
    expected, quantizer = network(images()), network[0].weight_quantizer
    with relaxed(network, images()) as relaxation:
        assert isinstance(network[0].weight_quantizer, CodesAndScales)
        assert torch.equal(network(images()), expected)
        relaxation.optimizer(network, REACH, steps=4)
    assert network[0].weight_quantizer is quantizer
    assert torch.equal(network(images()), expected)
    assert not network[0].weight.requires_grad and network[0].bias.requires_grad


def test_codes_and_scales_that_moved_are_written_into_the_layer():
    network = quantized(float_net(), bits=2)
    layer = network[-1]
    codes = layer.weight_quantizer.codes(layer.weight)
    with relaxed(network, images()), torch.no_grad():
        layer.weight_quantizer.position += 1.4
        layer.weight_quantizer.growth += math.log(2)
    moved = layer.weight_quantizer.codes(layer.weight)
    assert torch.equal(moved.q, (codes.q + 1).clamp(max=1))
    torch.testing.assert_close(moved.scale, 2 * codes.scale)
    assert torch.equal(layer.weight, moved.dequantize())


def test_weights_have_the_gradients_of_their_codes_and_scales():
    network = quantized(float_net())
    with relaxed(network, images()):
        trained = network[-1].weight_quantizer
        weight = trained(network[-1].weight)
        weight.sum().backward()
        torch.testing.assert_close(trained.growth.grad[:, 0], weight.sum(1).detach())
        torch.testing.assert_close(trained.position.grad, trained.scale().expand(5, 4))


def test_each_parameter_reaches_a_share_of_a_code():
    network = quantized(float_net(), quantizer=LsqPlus())
    spread = float(network(images()).detach().std())
    with relaxed(network, images()) as relaxation:
        groups = relaxation.optimizer(network[-1], REACH, steps=4).param_groups
        rates = {id(group["params"][0]): group["lr"] for group in groups}
        layer, activation = network[-1], network[-1].input_quantizer
        scale = activation.scale.item()
        assert rates == {
            # Codes of the weight end at -4, those of the activation at 15.
            id(layer.weight_quantizer.growth): pytest.approx(0.05 / 4),
            id(layer.weight_quantizer.position): pytest.approx(0.25),
            id(layer.bias): pytest.approx(0.05 * spread / 4),
            id(activation.scale): pytest.approx(0.05 * scale / 15),
            id(activation.offset): pytest.approx(0.05 * scale),
        }
        assert [p for p in network.parameters() if p.requires_grad] == [
            p for p in network.parameters() if id(p) in rates
        ]


def test_shared_weights_stay_and_other_quantizers_are_refused():
    first = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = first.weight
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), first, tied)
    shared = quantized(network.eval())
    with relaxed(shared, images()):
        assert isinstance(shared[0].weight_quantizer, CodesAndScales)
        assert shared[3].weight_quantizer is shared[4].weight_quantizer
        assert not isinstance(shared[3].weight_quantizer, CodesAndScales)
    other = quantized(float_net(), quantizer=Dorefa())
    told = r"layer 0: its weight quantizer is Dorefa\w*; .* Lsq or LsqPlus"
    with pytest.raises(BitscapeError, match=told), relaxed(other, images()):
        pass
    with pytest.raises(BitscapeError, match="no quantized layer"), relaxed(float_net(), images()):
        pass


@pytest.mark.parametrize(("scales", "codes"), [(0.0, 1.0), (math.inf, 1.0), (0.1, -0.1), (0.1, math.inf)])
def test_a_reach_out_of_range_is_refused(scales, codes):
    with pytest.raises(BitscapeError, match="scales are above 0, codes at least 0"):
        Reach(scales=scales, codes=codes)
