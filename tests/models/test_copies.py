import functools
import types

import pytest
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.copies import copied


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def doubled(self: Block, x: Tensor) -> Tensor:
    return 2 * self.layer(x)


def in_a_closure(model: nn.Sequential) -> None:
    model[0].forward = lambda x: model[0].layer(x)


def in_a_method_of_a_closure(model: nn.Sequential) -> None:
    old = model[0].forward
    model[0].forward = lambda x: old(x)


def in_a_function_of_a_closure(model: nn.Sequential) -> None:
    def inner(x: Tensor) -> Tensor:
        return model[0].layer(x)

    model[0].forward = lambda x: inner(x)


def in_a_partial(model: nn.Sequential) -> None:
    model[0].forward = functools.partial(lambda scale, x: scale * model[0].layer(x), 2)


def by_a_global_name(model: nn.Sequential) -> None:
    space = {"held": model[0].layer}
    exec("def run(x): return held(x)", space)
    model[0].forward = space["run"]


@pytest.mark.parametrize(
    "hold", [in_a_closure, in_a_method_of_a_closure, in_a_function_of_a_closure, in_a_partial, by_a_global_name]
)
def test_a_function_that_would_run_the_originals_layers_is_refused_with_its_place(hold):
    model = nn.Sequential(Block(), nn.ReLU())
    hold(model)
    with pytest.raises(BitscapeError, match=r"model: 0\.forward is a function that holds layers of the network.*MethodType"):
        copied(model)


@pytest.mark.parametrize("bind", [types.MethodType, functools.partial])
def test_a_bound_function_follows_the_copy(bind):
    model = nn.Sequential(Block(), nn.ReLU())
    model[0].forward = bind(doubled, model[0])
    copy = copied(model)
    with torch.no_grad():
        copy[0].layer.weight.zero_()
        copy[0].layer.bias.fill_(3.0)
    assert torch.equal(copy(torch.ones(1, 2)), torch.full((1, 2), 6.0))


def test_a_function_without_layers_is_copied():
    model = nn.Sequential(Block(), nn.ReLU())
    model[1].forward = lambda x: x + 1
    assert torch.equal(copied(model)(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_what_cannot_be_copied_is_told():
    model = Block()
    model.kept = (number for number in range(3))
    with pytest.raises(BitscapeError, match=r"cannot be copied.*generator"):
        copied(model)


def test_outputs_that_the_network_keeps_are_copied_without_their_graph():
    model = Block()
    model.kept = {"features": [model.layer.weight * 2]}
    kept = copied(model).kept["features"][0]
    assert torch.equal(kept, 2 * model.layer.weight) and not kept.requires_grad
    assert model.kept["features"][0].requires_grad
