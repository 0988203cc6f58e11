import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.weights import (
    LARGEST_BIAS,
    IntegerWeight,
    bias_name,
    input_scale,
    integer_weight,
    with_positive_scales,
)
from bitscape.quant.quantizers import Dorefa
from bitscape.quant.quantizers.base import Codes
from tests.exporters.networks import images, quantized


def weights_in(codes: list[int], scale: list[float]) -> IntegerWeight:
    return IntegerWeight(torch.tensor(codes, dtype=torch.int16), torch.tensor(scale))


class TestWeights:
    @pytest.mark.parametrize(
        ("codes", "bits"),
        [
            ([0], 1),
            ([-1, 0], 1),
            ([1], 2),
            ([-2, 1], 2),
            ([-3], 3),
            ([2], 3),
            ([-2], 2),
            ([-128], 8),
            ([-8, 7], 4),
            ([8], 5),
            ([-9], 5),
            ([-128, 127], 8),
        ],
    )
    def test_bits_are_those_of_twos_complement(self, codes, bits):
        assert weights_in(codes, [1.0] * len(codes)).bits == bits

    @pytest.mark.parametrize("bits", range(1, 8))
    def test_levels_without_a_zero_become_odd_integers_of_half_the_scale(self, bits):
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).reshape(1, -1).expand(3, -1)
        codes = Codes(q, torch.tensor([0.3, 0.7, 1e-5]).reshape(3, 1), -0.5)
        weight = integer_weight("w", codes)
        assert torch.equal(weight.dequantize(), codes.dequantize())
        assert weight.q[0].tolist() == list(range(1 - 2**bits, 2**bits, 2))
        assert weight.bits == bits + 1

    def test_levels_without_a_zero_at_8_bits_are_refused(self):
        with pytest.raises(BitscapeError, match=r"conv\.weight: .* 9-bit integers; give the layer 7 bits"):
            integer_weight("conv.weight", Codes(torch.tensor([[127]], dtype=torch.int8), torch.tensor(1.0), -0.5))
        with pytest.raises(BitscapeError, match="9-bit integers"):
            integer_network(quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), bits=[(8, 8)], quantizer=Dorefa()), images())

    def test_one_scale_is_that_of_every_channel(self):
        weight = integer_weight("w", Codes(torch.zeros(4, 2, 1, 1, dtype=torch.int8), torch.tensor(0.25), 0.0))
        assert weight.scale.tolist() == [0.25] * 4


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

    def test_a_dead_channel_behind_a_dead_input_keeps_its_bias(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 2))
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.fill_(-1.0)  # nothing passes the ReLU
            model[2].weight[0] = 0.0
            model[2].bias.copy_(torch.tensor([0.0, 0.5, -0.5, 3.0]))
        integer = integer_network(quantized(model, bits=[(8, 8)]), images())
        spacing = integer.weights["2.weight"].scale * input_scale(integer.module.graph, "2.weight")
        assert (spacing.abs() > torch.finfo(torch.float32).tiny).all()
        torch.testing.assert_close(integer.biases["2.weight"] * spacing, model[2].bias.detach(), rtol=1e-6, atol=0)


def test_codes_turn_where_scales_are_negative_and_have_room_for_it() -> None:
    q = torch.tensor([[-8, 7], [-8, 7], [-128, 127], [-128, 127]], dtype=torch.int16)
    weight = IntegerWeight(q, torch.tensor([0.5, -0.5, 0.5, -0.5]))
    turned = with_positive_scales(weight)
    assert turned.q.tolist() == [[-8, 7], [8, -7], [-128, 127], [127, -126]]
    assert bool((turned.scale > 0).all()) and turned.scale[:3].tolist() == [0.5] * 3
    torch.testing.assert_close(turned.dequantize()[:3], weight.dequantize()[:3])
    assert (turned.dequantize()[3] - weight.dequantize()[3]).abs().max() <= turned.scale[3] / 2
