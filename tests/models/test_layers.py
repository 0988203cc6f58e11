import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import input_channels, layer_shapes, output_channels, quantizable_layers
from bitscape.models.products import MatMul


class _Wider(nn.Linear):
    pass


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.stack = nn.Sequential(nn.ReLU(), self.first, nn.Conv2d(1, 2, 3))
        self.again = self.stack[2]


def test_each_layer_appears_once_under_its_first_name():
    model = _Shared()
    assert list(quantizable_layers(model)) == ["first", "stack.2"]
    assert quantizable_layers(model)["stack.2"] is model.again


def test_counts_subclasses_but_nothing_else():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv2d(1, 2, 3), _Wider(3, 4), nn.BatchNorm2d(2), nn.Bilinear(2, 2, 2))
    assert layer_shapes(model) == {"0": (2, 1, 3), "1": (2, 1, 3, 3), "2": (4, 3)}


def test_volumes_transposed_convolutions_and_products_of_activations_take_bits():
    model = nn.Sequential(nn.Conv3d(2, 4, 1), nn.ConvTranspose2d(2, 6, 3, groups=2), MatMul())
    assert layer_shapes(model) == {"0": (4, 2, 1, 1, 1), "1": (2, 3, 3, 3), "2": (0,)}
    assert [output_channels(model[0]), output_channels(model[1])] == [4, 6]
    assert [input_channels(model[0]), input_channels(model[1])] == [2, 2]


def test_a_layer_that_attention_never_calls_is_left_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(quantizable_layers(layer)) == ["linear1", "linear2"]


def test_a_lone_layer_has_the_empty_name():
    assert list(quantizable_layers(nn.Linear(1, 1))) == [""]


def test_a_lazy_layer_is_an_error_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(BitscapeError, match=r"'0' \(LazyLinear\) has no shape yet"):
        layer_shapes(model)
    model(torch.zeros(1, 5))
    assert layer_shapes(model) == {"0": (3, 5)}
