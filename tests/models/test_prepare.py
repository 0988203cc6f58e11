import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from bitscape.cost.layers import measure
from bitscape.cost.policy_cost import policy_cost
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.models.prepare import as_prepared, prepare
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.repair import equalize, input_moments
from bitscape.searches.problem import SearchProblem

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net(layer: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), layer or nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*layers).eval()


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return logits


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.transpose(0, 1)) / 2


def pruned(layer: nn.Module, tensor: str = "weight") -> nn.Module:
    return prune.random_unstructured(layer, tensor, 0.5)


def parametrized(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


def with_weight_as_buffer(layer: nn.Module) -> nn.Module:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (pruned, r"prune\.remove\(layer, 'weight'\)"),
        (weight_norm, r"remove_weight_norm\(layer, 'weight'\)"),
        (spectral_norm, r"remove_spectral_norm\(layer, 'weight'\)"),
        (parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
        (parametrized, r"remove_parametrizations\(layer, 'weight'\)"),
        (functools.partial(pruned, tensor="bias"), r"prune\.remove\(layer, 'bias'\)"),
        (with_weight_as_buffer, r"layer\.weight = torch\.nn\.Parameter"),
    ],
)
@pytest.mark.parametrize(
    "door",
    [
        prepare,
        layer_shapes,
        lambda model: measure(model, (3, 6, 6)),
        lambda model: with_quantizers(model, uniform_policy(["0", "1", "3"], LayerBits(4, 4))),
        lambda model: SearchProblem.of(model=model, samples=IMAGES, budget="bitops=0.5x"),
        lambda model: fold_norms(model, IMAGES),
        lambda model: fold_norms(model, IMAGES, inplace=True),
        lambda model: equalize(model, IMAGES),
        lambda model: input_moments(model, IMAGES),
    ],
)
def test_a_computed_weight_is_refused_with_the_layers_name_at_every_door(wrap, advice, door):
    with pytest.raises(BitscapeError, match=f"of layer '1' is computed.*{advice}"):
        door(net(wrap(nn.Conv2d(4, 4, 3, padding=1))))


@pytest.mark.parametrize("remove", [lambda layer: prune.remove(layer, "weight")])
def test_with_the_advice_taken_the_layer_takes_bits(remove):
    model = net(pruned(nn.Conv2d(4, 4, 3, padding=1)))
    remove(model[1])
    assert layer_shapes(prepare(model))["1"] == (4, 4, 3, 3)


def as_hooks_of_accelerate(layer: nn.Module) -> None:
    layer._old_forward = layer.forward
    layer.forward = functools.partial(lambda module, *args: module._old_forward(*args), layer)


def as_a_method(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight, padding=1), layer)


def as_a_function(layer: nn.Module) -> None:
    layer.forward = lambda x: F.conv2d(x, layer.weight, padding=1)


@pytest.mark.parametrize("patch", [as_hooks_of_accelerate, as_a_method, as_a_function])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_set_on_a_layer_is_refused_with_the_layers_name(patch, inplace):
    model = net()
    patch(model[1])
    with pytest.raises(BitscapeError, match=r"layer '1' has a forward of its own.*del layer\.forward"):
        with_quantizers(model, uniform_policy(["0", "1", "3"], LayerBits(2, 2)), inplace=inplace)
    del model[1].forward
    assert list(layer_shapes(prepare(model))) == ["0", "1", "3"]


def test_a_compiled_network_is_refused():
    compiled = torch.compile(net(), backend="eager")
    with pytest.raises(BitscapeError, match=r"compiled by torch\.compile; give the network that was compiled"):
        prepare(compiled)


def test_a_prepared_network_is_a_copy_with_split_attention_and_the_same_outputs_and_modes():
    model = Attentive().train()
    model.head.eval()
    prepared = prepare(model)
    assert prepared.training and not prepared.head.training
    names = ["patches", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj", "head"]
    assert list(layer_shapes(prepared)) == names
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES))
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert layer_shapes(prepare(prepared)) == layer_shapes(prepared)


def test_what_needs_no_preparation_is_read_as_it_is():
    model, prepared = net(), prepare(Attentive())
    assert as_prepared(model) is model and as_prepared(prepared) is prepared


def test_every_public_function_takes_the_policy_of_a_network_with_attention():
    model = Attentive().eval()
    policy = uniform_policy(layer_shapes(model), LayerBits(4, 4))
    policy.check(layer_shapes(model))
    cost = measure(model, (3, 6, 6))
    assert list(cost.by_name) == list(policy.layers)
    tokens = 9
    layers = tokens * 8 * 12 + 4 * tokens * 8 * 8 + 8 * 5
    assert policy_cost(cost, policy)["bitops"] == 16 * layers
    network = calibrate(with_quantizers(model, policy), IMAGES)
    assert measure(network, (3, 6, 6)).layers == cost.layers
