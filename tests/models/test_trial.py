import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscape.calling import map_tensors
from bitscape.errors import BitscapeError
from bitscape.models.trial import check_repeatable, check_weight_uses
from tests.networks import CALLED

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers, and a function of the network and their output."""

    def __init__(self, tail, head: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.tail = nn.Conv2d(3, 8, 3, padding=1), head or nn.Linear(8, 8), tail
        self.register_buffer("passes", torch.zeros(()))
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.head(F.relu(self.conv(x)).mean((2, 3))))


def counted(net: Net, y: Tensor) -> Tensor:
    net.passes += 1
    return y * net.passes


DRAW = {
    "dropout": lambda net, y: F.dropout(y, 0.3),
    "noise": lambda net, y: y + torch.randn(y.shape),
    "depth": lambda net, y: y * (torch.rand(len(y), 1) < 0.9),
    "python": lambda net, y: y * random.random(),
    "numpy": lambda net, y: y * float(np.random.rand()),
}


@pytest.mark.parametrize("kind", DRAW)
def test_a_network_that_draws_random_numbers_in_eval_mode_is_refused(kind):
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(BitscapeError, match=r"it draws random numbers in eval mode.*F\.dropout\(x, p, self\.training\)"):
        check_repeatable(Net(DRAW[kind]), IMAGES)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[2]).all()


def test_the_random_state_of_torch_stays_as_it_is():
    net = Net(DRAW["noise"])
    before = torch.get_rng_state()
    with pytest.raises(BitscapeError):
        check_repeatable(net, IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tail", [counted, lambda net, y: y + torch.randn(y.shape, generator=net.generator)])
def test_a_network_that_changes_from_pass_to_pass_is_refused(tail):
    with pytest.raises(BitscapeError, match="it changes from one pass to the next in eval mode"):
        check_repeatable(Net(tail), IMAGES)


@pytest.mark.parametrize(
    "tail",
    [
        lambda net, y: y,
        lambda net, y: F.dropout(y, 0.3, net.training),
        lambda net, y: F.dropout(y, 0.0),
        lambda net, y: (torch.rand(3), y)[1],
        lambda net, y: {"logits": y, "nothing": None, "levels": [y, (y, y)]},
    ],
)
def test_a_network_whose_outputs_repeat_is_taken_and_stays_in_its_mode(tail):
    net = Net(tail).train()
    check_repeatable(net, IMAGES)
    check_weight_uses(net, IMAGES)
    assert net.training and not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


ELSEWHERE = {
    "transposed": lambda net, y: F.linear(y, net.head.weight.t()),
    "normalized": lambda net, y: F.linear(y, F.normalize(net.head.weight)),
    "in a view": lambda net, y: y + net.head.weight.view(-1)[:8],
    "in a penalty": lambda net, y: (y, net.head.weight.square().sum()),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_weight_that_a_function_uses_too_is_refused_with_the_layers_name(kind):
    net = Net(ELSEWHERE[kind])
    weight = net.head.weight
    with pytest.raises(BitscapeError, match="the weight of layer 'head' is used outside of the layer too"):
        check_weight_uses(net, IMAGES)
    assert net.head.weight is weight and not net.head._forward_hooks and not net.head._forward_pre_hooks


@dataclass
class Scores:
    values: Tensor


@pytest.mark.parametrize("wrapped", [Scores, lambda y: {"scores": [y]}], ids=["dataclass", "nested"])
def test_outputs_are_compared_whatever_holds_them(wrapped):
    drawn = Net(lambda net, y: wrapped(y + torch.rand(())))
    with pytest.raises(BitscapeError, match="draws random numbers"):
        check_repeatable(drawn, IMAGES)
    used = Net(lambda net, y: wrapped(F.linear(y, net.head.weight.t())))
    with pytest.raises(BitscapeError, match="the weight of layer 'head' is used outside"):
        check_weight_uses(used, IMAGES)


def test_every_layer_whose_weight_is_used_elsewhere_is_named():
    net = Net(lambda net, y: F.linear(y, net.head.weight) + net.conv.weight.sum())
    with pytest.raises(BitscapeError, match="the weight of layer 'conv', 'head' is used"):
        check_weight_uses(net, IMAGES)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


def tied() -> Net:
    net = Net(lambda net, y: y + net.table(torch.zeros(len(y), dtype=torch.long)))
    net.table = nn.Embedding(8, 8)
    net.table.weight = net.head.weight
    return net


@pytest.mark.parametrize(
    "net",
    [
        lambda: Net(lambda net, y: y, head=Scaled(8, 8)),
        lambda: Net(lambda net, y: net.head(y)),
        lambda: Net(lambda net, y: y.type_as(net.head.weight) + net.head.weight.new_zeros(1)),
        lambda: Net(lambda net, y: y + 0.0 * net.head.weight.sum()),
        lambda: Net(lambda net, y: F.dropout(y, 0.5)),
        tied,
    ],
    ids=["its own forward", "twice", "type alone", "times zero", "random", "registered twice"],
)
def test_a_weight_that_its_layer_alone_uses_is_taken(net):
    check_weight_uses(net(), IMAGES)


def test_a_network_without_values_is_not_run():
    with torch.device("meta"):
        net = Net(ELSEWHERE["transposed"])
    check_weight_uses(net, IMAGES)
    check_repeatable(net, IMAGES)


@pytest.mark.parametrize("name", CALLED)
def test_networks_of_any_inputs_are_tried(name):
    network, inputs = CALLED[name].network(), CALLED[name].inputs(4)
    check_repeatable(network, inputs)
    check_weight_uses(network, inputs)
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    network.register_forward_hook(lambda module, args, output: map_tensors(lambda t: t * layer.weight.sum(), output))
    with pytest.raises(BitscapeError, match="is used outside of the layer too"):
        check_weight_uses(network, inputs)
