import torch
from torch import nn

from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.switched import make_switched, use_bits


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 5))
    model[3].weight = model[2].weight
    return model


IMAGES = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def switched(weight_bits=(2, 4), activation_bits=(3, 8)):
    model = with_quantizers(network(), uniform_policy(["0", "2", "3"], LayerBits(8, 8)))
    make_switched(model, ["0", "2", "3"], weight_bits, activation_bits)
    return calibrate(model, IMAGES)


def test_at_each_pair_of_widths_it_is_the_network_quantized_to_them():
    model = switched()
    for bits in (LayerBits(2, 3), LayerBits(4, 8), LayerBits(2, 8)):
        for layer in quantized_layers(model).values():
            use_bits(layer, bits)
            assert static_bits(layer) == bits
        plain = calibrate(with_quantizers(network(), uniform_policy(["0", "2", "3"], bits)), IMAGES)
        assert torch.equal(model(IMAGES), plain(IMAGES))


def test_the_widest_are_in_use_at_first():
    assert {static_bits(layer) for layer in quantized_layers(switched()).values()} == {
        LayerBits(4, 8)
    }


def test_only_the_width_in_use_gets_a_gradient_and_the_weight_always():
    model = switched()
    use_bits(model[0], LayerBits(2, 3))
    model(IMAGES).sum().backward()
    of_weight, of_input = model[0].weight_quantizer, model[0].input_quantizer
    assert of_weight.at(2).scale.grad is not None and of_weight.at(4).scale.grad is None
    assert of_input.at(3).scale.grad is not None and of_input.at(8).scale.grad is None
    assert model[0].weight.grad is not None


def test_layers_of_one_weight_share_its_quantizer():
    model = switched()
    assert model[2].weight_quantizer is model[3].weight_quantizer
    assert model[2].input_quantizer is not model[3].input_quantizer
