import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitscape.errors import BitscapeError
from bitscape.quant.repair import input_moments
from bitscape.quant.repair.moments import _Windows


def assert_moments_give_the_output_power(layer: nn.Module, images: torch.Tensor, model: nn.Module | None = None) -> None:
    """w H w^T, summed over rows, is the mean squared output without bias: a check that needs no unfolding of its own."""
    moments = input_moments(model or nn.Sequential(layer), images)["0" if model is None else "layer"].mean
    weight = layer.weight.detach().reshape(moments.shape[0], -1, moments.shape[1])
    expected = ((weight @ moments) * weight).sum(2).flatten()
    with torch.no_grad():
        output = (model or layer)(images)
    actual = output.square().mean([i for i in range(output.ndim) if i != (output.ndim - 1 if isinstance(layer, nn.Linear) else 1)])
    torch.testing.assert_close(expected, actual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (1, 3), "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    ],
)
def test_convolutions_of_every_kind(settings):
    torch.manual_seed(0)
    assert_moments_give_the_output_power(nn.Conv2d(4, 8, bias=False, **settings), torch.randn(3, 4, 9, 8))


def test_one_dimensional_convolutions():
    torch.manual_seed(0)
    assert_moments_give_the_output_power(nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), torch.randn(3, 4, 9))


@pytest.mark.parametrize("shape", [(5, 6), (5, 7, 6), (2, 3, 4, 6)])
def test_linear_layers_on_images_and_tokens(shape):
    torch.manual_seed(0)
    assert_moments_give_the_output_power(nn.Linear(6, 4, bias=False), torch.randn(shape))


class Same(nn.Conv2d):
    """Pads right and below, by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_padding_of_the_layers_own_is_seen():
    torch.manual_seed(0)
    assert_moments_give_the_output_power(Same(3, 4, 3, stride=2, bias=False), torch.randn(3, 3, 8, 8))


def test_a_layer_called_twice_averages_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return torch.cat([self.layer(x), self.layer(x * 2)])

    torch.manual_seed(0)
    model = Twice()
    assert_moments_give_the_output_power(model.layer, torch.randn(4, 3), model)


def test_batches_and_a_tensor_agree_and_positions_are_drawn_by_seed():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(8, 2, 12, 12)
    whole = input_moments(model, images)["0"].mean
    torch.testing.assert_close(input_moments(model, iter(images.split(3)))["0"].mean, whole)
    few = input_moments(model, images, positions=10)["0"].mean
    assert torch.equal(few, input_moments(model, images, positions=10)["0"].mean)
    assert not torch.equal(few, input_moments(model, images, positions=10, seed=1)["0"].mean)
    torch.testing.assert_close(few, whole, atol=0.6, rtol=0.0)


def test_attention_is_split_and_layers_with_a_computed_weight_are_left_out(caplog):
    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight - self.weight.mean(), self.bias)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), Standardised(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    model = Block()
    moments = input_moments(model, torch.randn(2, 5, 8))
    assert sorted(moments) == [f"attention.{name}_proj" for name in ("k", "out", "q", "v")]
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert "layer head: no moments" in caplog.text


def test_inputs_that_are_not_finite_are_named():
    with pytest.raises(BitscapeError, match="layer 0: its inputs, or their squares in float32, are not finite"):
        input_moments(nn.Sequential(nn.Linear(2, 2)), torch.full((1, 2), torch.nan))


@pytest.mark.parametrize(
    ("images", "message"),
    [([], "images: no batch; give at least one image"), (torch.zeros(2, 5), r"fails on a batch of shape \(2, 5\)")],
)
def test_what_gives_no_moments_is_an_error(images, message):
    with pytest.raises(BitscapeError, match=message):
        input_moments(nn.Sequential(nn.Linear(2, 2)), images)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_windows_lie_where_unfolding_puts_them(padding):
    x, size, dilation = torch.randn(2, 3, 7, 6), (3, 2), (2, 1)
    windows = _Windows(x.shape[2:], torch.Size(size), (1, 1), padding, dilation)
    places, inside = windows.places(torch.arange(windows.count))
    taken = x.flatten(2)[:, :, places].where(inside, 0).unflatten(2, (windows.count, -1))
    around = {0: (0, 0, 0, 0), 1: (1, 1, 1, 1), "same": (0, 1, 2, 2)}[padding]
    expected = F.unfold(F.pad(x, around), size, dilation=dilation)
    assert torch.equal(taken.transpose(2, 3).flatten(1, 2), expected)
