import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import bypassed, with_quantizers
from bitscape.quant.quantizers import Lsq, PerTensor
from bitscape.quant.repair import ChannelClip, equalize


def uneven(*modules: nn.Module) -> nn.Module:
    """Layers, all but the last with output channels that differ a thousandfold in range."""
    torch.manual_seed(0)
    model = nn.Sequential(*modules).eval()
    for layer in list(model)[:-1]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data *= torch.logspace(-1.5, 1.5, len(layer.weight)).reshape(-1, *[1] * (layer.weight.ndim - 1))
    return model


def depthwise() -> nn.Module:
    torch.manual_seed(1)  # of channels none of which meets the limit of a scale
    return uneven(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 4, 1, groups=2),
    )  # fmt: skip


def ranges(model: nn.Module, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = model[first].weight, model[last].weight
    columns = b.reshape(model[last].groups, -1, b.shape[1], b[0, 0].numel())
    return a.flatten(1).abs().amax(1), columns.abs().amax((1, 3)).flatten()


def test_ranges_meet_and_the_output_stays():
    model, images = depthwise(), torch.randn(2, 3, 8, 8)
    result = equalize(model, images)
    assert result.pairs == (("0", "3"), ("3", "6"))
    assert result.skipped == ()
    for first, last in ((0, 3), (3, 6)):
        a, b = ranges(result.model, first, last)
        torch.testing.assert_close(a, b, rtol=5e-3, atol=0.0)
    torch.testing.assert_close(result.model(images), model(images), rtol=1e-4, atol=1e-3)


def test_it_makes_one_scale_per_tensor_usable():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval(), torch.randn(4, 3, 8, 8)
    spread = torch.logspace(-1.0, 1.0, 32)
    model[0].weight.data *= spread[:, None, None, None]
    model[0].bias.data *= spread
    model[2].weight.data /= spread[None, :, None, None]

    @torch.no_grad()
    def error(network: nn.Module) -> float:
        policy = uniform_policy(layer_shapes(network), LayerBits(6, 8))
        quantized = with_quantizers(network, policy, Lsq(weight_scales=PerTensor()))
        with bypassed(quantized, "input_quantizer"):
            return float((quantized(images) - model(images)).norm() / model(images).norm())

    assert error(equalize(model, images).model) < 0.4 * error(model)


def test_relu6_becomes_a_bound_for_each_channel_or_is_skipped_and_listed():
    model = uneven(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    images = torch.randn(2, 3, 8, 8)
    assert (model[0](images) > 6).any()
    result = equalize(model, images)
    assert isinstance(result.model[1], ChannelClip)
    torch.testing.assert_close(result.model(images), model(images), rtol=1e-4, atol=1e-4)
    kept = equalize(model, images, clip_channels=False)
    assert kept.pairs == ()
    assert kept.skipped == ("0 (ReLU6 before 2)",)


@pytest.mark.parametrize("between", [nn.SiLU(), nn.LayerNorm(8), nn.BatchNorm2d(8)])
def test_what_is_not_homogeneous_is_left(between):
    model = uneven(nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1))
    result = equalize(model, torch.randn(2, 3, 8, 8))
    assert result.pairs == ()
    assert torch.equal(result.model[0].weight, model[0].weight)


def test_dead_channels_and_linear_layers():
    model = uneven(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].weight.data[2] = 0.0
    result = equalize(model, torch.randn(4, 6), inplace=True)
    assert result.model is model
    assert result.pairs == (("0", "2"),)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_functions_between_layers_and_second_users():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            y = torch.relu(self.b(torch.nn.functional.relu(self.a(x))))
            return self.c(y) + y

    assert equalize(Functional(), torch.randn(2, 3, 4, 4)).pairs == (("a", "b"),)


def test_a_quantized_model_is_refused_and_a_hidden_use_is_an_error():
    class Hidden(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[2](self[1](y)) + y.tolist()[0][0][0][0]

    model = uneven(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(BitscapeError, match="hidden way"):
        equalize(Hidden(*model), torch.randn(1, 3, 4, 4))
    policy = uniform_policy(layer_shapes(model), LayerBits(4, 8))
    with pytest.raises(BitscapeError, match="it is quantized"):
        equalize(with_quantizers(model, policy), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, x: (model.bfloat16(), x), r"the network must be float32: call model\.float\(\) first"),
        (lambda model, x: (model, x.double()), r"example: torch\.float64; give a float32 tensor"),
        (lambda model, x: (model, x[:0]), r"example: shape \(0, 3, 9, 9\); give at least one image"),
        (lambda model, x: (model, x[:, :2]), r"fails on a batch of shape .* check channels"),
        (lambda model, x: (model, x.fill_(torch.nan)), "the network's outputs on it hold NaN"),
    ],
)
def test_what_the_example_or_the_network_lacks_is_named(change, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(BitscapeError, match=message):
        equalize(*change(model, torch.zeros(2, 3, 9, 9)))
