import copy

import pytest
import torch
from torch import Tensor, nn

import bitscape as bs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.measure.analysis.twins import Twins, standing_in
from bitscape.models.layers import layer_shapes
from bitscape.models.products import product_names
from bitscape.policy import LayerBits, uniform_policy
from tests.networks import conv_norm, drawn

IMAGES = drawn(8, 3, 6, 6)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        network = nn.Sequential(*conv_norm(3, 4, 3), nn.ReLU(), *head).eval()
        network[1].running_var.uniform_(0.5, 2.0)
        return network


def policy(model: nn.Module) -> bs.Policy:
    return uniform_policy([*layer_shapes(model), *product_names(model)], LayerBits(2, 4))


@pytest.mark.parametrize("repair", ["compensate", None])
def test_the_twin_of_a_folded_network_is_folded_and_gives_the_float_outputs(repair):
    model = net()
    network = bs.quantize(model, policy(model), IMAGES, repair=repair)
    twins = Twins.of(network, model, Samples.of(IMAGES))
    assert isinstance(twins.twin[1], nn.Identity)
    torch.testing.assert_close(twins.twin(IMAGES), model(IMAGES))


def test_the_twin_of_a_network_with_norms_keeps_them():
    model = net()
    network = bs.quantize(model, policy(model), IMAGES, for_training=True)
    twins = Twins.of(network, model, Samples.of(IMAGES))
    assert isinstance(twins.twin[1], nn.BatchNorm2d)


def test_without_a_reference_the_twin_has_the_weights_before_their_quantizers():
    model = net()
    network = bs.quantize(model, policy(model), IMAGES, for_training=True, repair=None)
    twins = Twins.of(network, None, Samples.of(IMAGES))
    assert torch.equal(twins.twin(IMAGES), model(IMAGES))


def test_layers_take_each_others_place_and_are_put_back():
    model = net()
    network = bs.quantize(model, policy(model), IMAGES, repair=None)
    twins = Twins.of(network, model, Samples.of(IMAGES))
    first, last = twins.layers.values()
    in_float, in_bits = twins.twin(IMAGES), network(IMAGES)
    features = twins.exact["0"](IMAGES).relu().mean((2, 3))
    with twins.quantized_in_twin("both", "5") as twin:
        alone = twin(IMAGES)
    torch.testing.assert_close(alone, last(features))
    with twins.exact_in_network("5") as mixed:
        others = mixed(IMAGES)
    torch.testing.assert_close(others, twins.exact["5"](first(IMAGES).relu().mean((2, 3))))
    assert torch.equal(twins.twin(IMAGES), in_float) and torch.equal(network(IMAGES), in_bits)


def test_halves_quantize_one_of_two():
    model = net()
    network = bs.quantize(model, policy(model), IMAGES, repair=None)
    twins = Twins.of(network, model, Samples.of(IMAGES))
    layer, exact = twins.layers["5"], twins.exact["5"]
    x = torch.rand(8, 4)
    weight = layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(twins.half("5", "weight")(x), nn.functional.linear(x, weight, layer.bias))
    on_grid = layer.input_quantizer(x)
    torch.testing.assert_close(twins.half("5", "input")(x), nn.functional.linear(on_grid, exact.weight, exact.bias))


def test_hooks_go_with_the_layer_and_an_exception_puts_it_back():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError), standing_in(layer, other):
        assert torch.equal(layer.weight, other.weight)
        raise ValueError
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_products_of_attention_have_twins():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().eval()
    tokens = drawn(4, 5, 8)
    network = bs.quantize(model, policy(model), tokens, repair=None)
    twins = Twins.of(network, model, Samples.of(tokens))
    torch.testing.assert_close(twins.twin(tokens), model(tokens))
    with twins.quantized_in_twin("both", "attention.scores") as twin:
        assert not torch.allclose(twin(tokens), model(tokens))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "weights lie on their grids already"),
        (nn.Sequential(nn.Linear(3, 4)), "reference: its norms are not|reference: it has no layer"),
    ],
)
def test_networks_without_a_float_twin_are_refused(reference, message):
    model = net()
    network = bs.quantize(model, policy(model), IMAGES)
    reference = reference and nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()).eval()
    with pytest.raises(BitscapeError, match=message):
        Twins.of(network, reference, Samples.of(IMAGES))
