"""Transposed and 3-d convolutions through quantizing, folding, equalizing and repair: their weight has inputs first."""

import pytest
import torch
from torch import nn

from bitscape.models.layers import layer_shapes, outputs_first, weight_layout
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.mixture import mix
from bitscape.quant.repair import equalize, repair
from bitscape.quant.repair.moments import input_moments

KINDS = [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)]


def transposed(dims: int = 2, groups: int = 1, inputs: int = 4, outputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    kind = KINDS[dims - 1][0]
    return kind(inputs, outputs, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2 if dims < 3 else 1)


def examples(dims: int = 2, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, *[4] * dims, generator=torch.Generator().manual_seed(1))


def decoder(groups: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.fill_(0.2)
    norm.running_var.copy_(torch.linspace(0.5, 2, 8))
    norm.weight.data[::3] *= -1
    last = nn.Conv2d(8, 3, 1)
    return nn.Sequential(transposed(groups=groups), norm, nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=groups), nn.ReLU(), last).eval()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_hold_the_weights_of_one_output(groups):
    layer = transposed(groups=groups)
    rows = outputs_first(layer, layer.weight)
    assert rows.shape == (8, 4 // groups, 3, 3)
    group, within = divmod(5, 8 // groups)
    assert torch.equal(rows[5], layer.weight[group * 4 // groups : (group + 1) * 4 // groups, within])
    assert torch.equal(outputs_first(layer, rows), layer.weight)


@pytest.mark.parametrize(("groups", "shape"), [(1, (1, 8, 1, 1)), (2, (1, 4, 1, 1)), (4, (4, 1, 1, 1))])
def test_scales_lie_along_output_channels_and_groups_share_them(groups, shape):
    model = nn.Sequential(transposed(groups=groups))
    layer = with_quantizers(model, uniform_policy(["0"], LayerBits(8, 8)))[0]
    assert tuple(layer.weight_quantizer.scale.shape) == shape
    error = (layer.weight_quantizer(layer.weight) - layer.weight).detach()
    assert float(error.norm() / layer.weight.detach().norm()) < 0.01


def test_scales_of_outputs_repeat_over_groups():
    one, two = weight_layout(transposed(groups=2)), weight_layout(nn.ConvTranspose2d(3, 6, 1, groups=3))
    assert one.of_outputs(torch.tensor([1.0, 2.0]), 4).tolist() == [1, 2, 1, 2]
    assert two.of_outputs(torch.tensor([1.0, 2.0, 3.0]), 6).tolist() == [1, 1, 2, 2, 3, 3]
    assert one.largest(torch.tensor([1.0, 5.0, 3.0, 2.0]), 2).tolist() == [3, 5]
    assert two.largest(torch.tensor([1.0, 5.0, 3.0, 2.0]), 2).tolist() == [5, 3]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_moments_give_the_squared_output(dims, groups):
    layer, x = transposed(dims, groups), examples(dims)
    moments = input_moments(nn.Sequential(layer), x, positions=10**6)["0"].mean
    rows = outputs_first(layer, layer.weight).detach().reshape(groups, -1, moments.shape[1])
    bias = layer.bias.reshape(-1, *[1] * dims)
    expected = (layer(x) - bias).detach().square().mean([0, *range(2, 2 + dims)])
    torch.testing.assert_close(((rows @ moments) * rows).sum(2).flatten(), expected)


def test_moments_of_a_volume_give_the_squared_output():
    layer, x = nn.Conv3d(4, 2, 2, bias=False), examples(3)
    moments = input_moments(nn.Sequential(layer), x, positions=10**6)["0"].mean
    rows = layer.weight.detach().reshape(1, 2, -1)
    torch.testing.assert_close(((rows @ moments) * rows).sum(2).flatten(), layer(x).detach().square().mean([0, 2, 3, 4]))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norms_fold_and_channels_equalize_at_the_same_function(groups):
    model, x = decoder(groups), examples()
    folded = fold_norms(model, x)
    assert isinstance(folded[1], nn.Identity)
    equal = equalize(folded, x)
    assert equal.pairs == (("0", "3"), ("3", "5"))
    torch.testing.assert_close(equal.model(x), model(x), rtol=1e-4, atol=1e-6)
    ranges = outputs_first(equal.model[0], equal.model[0].weight).flatten(1).abs().amax(1)
    if groups == 1:
        torch.testing.assert_close(ranges, equal.model[3].weight.flatten(1).abs().amax(1), rtol=2e-2, atol=0)


def test_a_norm_behind_a_quantized_one_folds_into_its_scales():
    model, x = decoder(), examples()
    with torch.no_grad():
        model[1].weight.abs_()  # the code -128 has no opposite
    quantized = calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(4, 8))), x)
    folded = fold_norms(quantized, x)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), quantized(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repair_comes_nearer_to_the_float_network(groups):
    folded, x = fold_norms(decoder(groups), examples(n=8)), examples(n=8)
    quantized = calibrate(with_quantizers(folded, uniform_policy(layer_shapes(folded), LayerBits(3, 8))), x)
    before = float((quantized(x) - folded(x)).detach().norm())
    repair(quantized, folded, x)
    assert float((quantized(x) - folded(x)).detach().norm()) < 0.8 * before


def test_a_mixture_has_scales_of_output_channels():
    model, x = nn.Sequential(transposed()), examples()
    network = calibrate(mix(model, (4, 8), (8,), [["0"]], {}), x)
    quantizer = network[0].weight_quantizer
    assert quantizer.scale.shape == (2, 8)
    plain = [with_quantizers(model, uniform_policy(["0"], LayerBits(bits, 8)))[0].weight_quantizer(model[0].weight) for bits in (4, 8)]
    torch.testing.assert_close(quantizer(model[0].weight), (plain[0] + plain[1]) / 2)


def test_output_size_still_chooses_among_sizes():
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 3, stride=2))
    layer = calibrate(with_quantizers(model, uniform_policy(["0"], LayerBits(8, 8))), examples())[0]
    assert layer(examples(), output_size=[10, 10]).shape == (3, 2, 10, 10)
