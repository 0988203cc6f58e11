import pytest
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.models.replace import replace_module


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.stack = nn.Sequential(nn.ReLU(), self.first, nn.Conv2d(1, 2, 3))
        self.again = self.stack[2]


def test_replaces_a_shared_module_everywhere():
    model, new = _Shared(), nn.Linear(4, 4)
    replace_module(model, model.first, new)
    assert model.first is new
    assert model.stack[1] is new
    assert list(quantizable_layers(model)) == ["first", "stack.2"]


def test_replacing_keeps_the_order_of_the_state_dict():
    model = _Shared()
    before = list(model.state_dict())
    replace_module(model, model.first, nn.Linear(4, 4))
    assert list(model.state_dict()) == before


def test_replacing_what_is_not_there_is_an_error():
    model = _Shared()
    with pytest.raises(BitscapeError, match="registered nowhere"):
        replace_module(model, nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(BitscapeError, match="is the model itself"):
        replace_module(model, model, nn.ReLU())
