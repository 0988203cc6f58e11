import copy

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes, quantizable_layers
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Dorefa, Lsq, PerTensor
from bitscape.quant.repair import correct_biases
from bitscape.quant.repair.bias import Correction


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 6),
    ).eval()  # fmt: skip


def quantized(model: nn.Module, images: torch.Tensor, bits: int = 2, quantizer=None) -> nn.Module:
    return calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(bits, 4)), quantizer or Lsq()), images)


def outputs(model: nn.Module, layers, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer name -> its output, channels first, on `images`."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, _, out, name=name: seen.update({name: out.movedim(1, 0).flatten(1)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("gain", [True, False])
def test_channels_of_every_layer_get_their_float_mean_and_deviation(gain):
    model, images = network(), torch.randn(32, 3, 12, 12)
    repaired = quantized(model, images)
    correct_biases(repaired, model, images, gain=gain)
    expected = outputs(model, quantizable_layers(model), images)
    actual = outputs(repaired, quantized_layers(repaired), images)
    for name in expected:
        torch.testing.assert_close(actual[name].mean(1), expected[name].mean(1), atol=1e-3, rtol=1e-3)
        ratio = actual[name].std(1) / expected[name].std(1)
        assert bool(((ratio - 1).abs() < 1e-2).all()) is gain


def test_the_output_error_falls_and_codes_stay():
    model, images = network(), torch.randn(64, 3, 12, 12)
    repaired = quantized(model, images)
    before = copy.deepcopy(repaired)
    correct_biases(repaired, model, images)
    with torch.no_grad():
        target = model(images)
        assert (repaired(images) - target).norm() < 0.8 * (before(images) - target).norm()
    for old, new in zip(quantized_layers(before).values(), quantized_layers(repaired).values(), strict=True):
        assert torch.equal(old.weight_quantizer.codes(old.weight).q, new.weight_quantizer.codes(new.weight).q)
        assert torch.equal(new.weight_quantizer(new.weight), new.weight)


def test_several_batches_come_close_to_one():
    model, images = network(), torch.randn(64, 3, 12, 12)
    one, many = quantized(model, images), quantized(model, images)
    correct_biases(one, model, [images])
    correct_biases(many, model, iter(images.split(16)))
    for a, b in zip(quantized_layers(one).values(), quantized_layers(many).values(), strict=True):
        torch.testing.assert_close(a.bias, b.bias, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("quantizer", [Lsq(weight_scales=PerTensor()), Dorefa()])
def test_quantizers_without_channel_scales_get_their_means_alone(quantizer):
    model, images = network(), torch.randn(32, 3, 12, 12)
    repaired = quantized(model, images, quantizer=quantizer)
    weight = repaired[0].weight.clone()
    correct_biases(repaired, model, images)
    assert torch.equal(repaired[0].weight, weight)
    expected = outputs(model, quantizable_layers(model), images)
    actual = outputs(repaired, quantized_layers(repaired), images)
    torch.testing.assert_close(actual["2"].mean(1), expected["2"].mean(1), atol=1e-3, rtol=1e-3)


def test_a_layer_called_twice_and_one_without_bias():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.plain(self.layer(self.layer(x)))

    torch.manual_seed(0)
    model, images = Twice(), torch.randn(64, 4)
    repaired = quantized(model, images)
    assert list(correct_biases(repaired, model, images)) == ["layer"]
    assert repaired.plain.bias is None


def test_constant_channels_keep_their_gain():
    model, images = network(), torch.randn(8, 3, 12, 12)
    nn.init.zeros_(model[0].weight[0])
    repaired = quantized(model, images)
    correct_biases(repaired, model, images)
    assert all(torch.isfinite(p).all() for p in repaired.parameters())


def test_wrong_input_is_refused():
    model, images = network(), torch.randn(4, 3, 12, 12)
    repaired = quantized(model, images)
    with pytest.raises(BitscapeError, match="float_model: it has no layer '0'"):
        correct_biases(repaired, nn.Linear(2, 2), images)
    with pytest.raises(BitscapeError, match="at least one image"):
        correct_biases(repaired, model, [])
    assert all(not m._forward_hooks for net in (model, repaired) for m in net.modules())


def test_attention_is_corrected_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(16, 5, 8)
    names = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["linear1", "linear2"]
    quantized = calibrate(with_quantizers(model, Policy(dict.fromkeys(names, LayerBits(3, 8)))), x)
    with torch.no_grad():
        before = (quantized(x) - model(x)).mean((0, 1)).abs().max()
        assert set(correct_biases(quantized, model, x)) == set(names)
        assert (quantized(x) - model(x)).mean((0, 1)).abs().max() < before


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv3d(6, 4, 1)], ids=repr)
def test_moments_of_channels_are_those_of_a_plain_mean(layer):
    (layer,) = quantized_layers(quantized(nn.Sequential(layer), torch.randn(8, 6, *[6] * (layer.weight.ndim - 2)))).values()
    output = 1000 + torch.randn(5, 4, *[7] * (layer.weight.ndim - 2))
    axis = 1
    if isinstance(layer, nn.Linear):
        output, axis = output[:, None] + torch.randn(5, 3, 4), 2
    for laid_out in (output, output.transpose(0, axis).contiguous().transpose(0, axis)):
        correction = Correction(layer, gain=True)
        correction.see_float(layer, None, laid_out)
        correction.see_quantized(laid_out)
        moments = correction.outputs.seen
        values = output.double().movedim(axis, 0).flatten(1)
        variance = moments[1] - moments[0].square()
        torch.testing.assert_close(moments[0], values.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(variance, values.var(1, correction=0), rtol=1e-3, atol=0)


def test_statistics_of_norms_move_so_that_channels_keep_their_mean_and_deviation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)
        model[1].bias.uniform_(-1, 1)
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    images = torch.randn(64, 3, 8, 8)
    network = quantized(model, images, bits=3)
    correct_biases(network, model, images)
    assert not torch.equal(network[1].running_mean, model[1].running_mean)
    expected, corrected = (
        outputs(m, {"1": m[1]}, images)["1"] for m in (model, network)
    )
    torch.testing.assert_close(corrected.mean(1), expected.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(corrected.std(1), expected.std(1), rtol=1e-4, atol=0)


def test_a_network_without_biases_stays_as_it_is():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).eval(), torch.randn(8, 3, 6, 6)
    network = quantized(model, images)
    before = network(images)
    assert correct_biases(network, model, images) == {}
    assert torch.equal(network(images), before)
