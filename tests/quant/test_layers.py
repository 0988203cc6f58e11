import copy
import math
import shutil

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.quant.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantizedLayer,
    QuantLinear,
    apply_layer,
    quantized_class,
    quantized_layers,
    require_float,
    static_bits,
)


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding: the right and the bottom get the odd pixel."""

    def forward(self, x):
        total = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        x = nn.functional.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        return nn.functional.conv2d(x, self.weight, self.bias, stride=2)


class StandardisedConv2d(nn.Conv2d):
    """A forward that computes with the weight, by way of `_conv_forward`."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), QuantConv1d),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 8, 8), QuantConv2d),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8), QuantConv2d),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8), QuantConv2d),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), QuantConv2d),
    "linear": (nn.Linear(5, 3), (2, 7, 5), QuantLinear),
    "same": (SameConv2d(4, 6, 3), (2, 4, 7, 8), QuantizedLayer),
    "standardised": (StandardisedConv2d(4, 6, 3), (2, 4, 8, 8), QuantizedLayer),
}
every_case = pytest.mark.parametrize("case", CASES)


FEW = LayerBits(3, 4)


def made(case: str, bits: LayerBits = FEW) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The float layer, its quantized form, calibrated, and an input."""
    layer, shape, _ = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return layer, calibrate(with_quantizers(layer, Policy({"": bits})), x), x


@every_case
def test_a_quantized_layer_is_the_layer_on_quantized_values(case):
    layer, quantized, x = made(case)
    by_hand = copy.deepcopy(layer)
    by_hand.weight.data = quantized.weight_quantizer(layer.weight).data
    expected = by_hand(quantized.input_quantizer(x))
    assert torch.equal(quantized(x), expected)
    assert not torch.allclose(expected, layer(x), atol=1e-3)


class ScaledConv2d(nn.Conv2d):
    """Has attributes of its own, of names that are common in research code."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.bits, self.scale, self.qmin, self.initialized, self.codes = 3, 0.5, -1, False, None

    def forward(self, x):
        return super().forward(x) * self.bits * self.scale


def test_a_layers_own_attributes_stay_its_own():
    torch.manual_seed(0)
    layer, x = ScaledConv2d(3, 4, 3), torch.randn(8, 3, 6, 6)
    quantized = calibrate(with_quantizers(layer, Policy({"": LayerBits(8, 8)})), x)
    assert (quantized.bits, quantized.scale) == (3, 0.5)
    assert static_bits(quantized) == LayerBits(8, 8)
    with torch.no_grad():
        expected = layer(x)
        assert float((quantized(x) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("value", [None, 4, nn.Identity()])
def test_a_layer_that_has_a_quantizer_of_its_own_is_refused_by_name(name, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    setattr(model[1], name, value)
    with pytest.raises(BitscapeError, match=rf"model: its layer '1' \(Conv2d\) has an attribute {name} of its own.*rename it"):
        with_quantizers(model, Policy(dict.fromkeys("01", LayerBits(4, 4))))
    with pytest.raises(BitscapeError, match=rf"float_model: .*{name}"):
        require_float(model, "float_model")


@every_case
def test_it_stays_an_instance_of_its_class(case):
    layer, quantized, _ = made(case)
    assert isinstance(quantized, type(layer)) or CASES[case][2] in (QuantConv1d, QuantConv2d, QuantLinear)
    assert isinstance(quantized, CASES[case][2]) and isinstance(quantized, QuantizedLayer)
    assert static_bits(quantized) == LayerBits(3, 4)
    assert quantized.get_parameter("weight").shape == layer.weight.shape


@every_case
def test_gradients_reach_weight_input_and_scales(case):
    _, quantized, x = made(case)
    x.requires_grad_()
    quantized(x).square().sum().backward()
    for tensor in (x, *quantized.parameters()):
        assert tensor.grad.abs().sum() > 0


@every_case
def test_8_bits_are_near_the_float_layer(case):
    layer, quantized, x = made(case, LayerBits(8, 8))
    error = (quantized(x) - layer(x)).square().mean() / layer(x).square().mean()
    assert error < 1e-3


@every_case
def test_bypassed_quantizers_leave_the_float_layer(case):
    layer, quantized, x = made(case)
    with bypassed(quantized):
        assert torch.equal(quantized(x), layer(x))


@every_case
@pytest.mark.parametrize("form", ["float", "quantized"])
def test_apply_layer_takes_another_weight_and_no_bias(case, form):
    layer, quantized, x = made(case)
    weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
    expected_layer = copy.deepcopy(layer)
    expected_layer.weight.data, expected_layer.bias = weight, None
    used = layer if form == "float" else quantized
    keys = set(used.__dict__)
    assert torch.equal(apply_layer(used, x, weight), expected_layer(x))
    assert set(used.__dict__) == keys


@every_case
def test_copies_and_state_dicts_work(case):
    layer, quantized, x = made(case)
    y = quantized(x)
    twin = copy.deepcopy(quantized)
    twin.weight.data.zero_()
    assert torch.equal(quantized(x), y)
    fresh = with_quantizers(layer, Policy({"": LayerBits(3, 4)}))
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(x), y)


def test_an_error_inside_an_own_forward_leaves_the_parameter_in_place():
    _, quantized, _ = made("same")
    with pytest.raises(RuntimeError):
        quantized(torch.zeros(2, 3, 8, 8))
    assert quantized.weight is quantized.get_parameter("weight")


def test_a_class_has_one_quantized_form():
    assert quantized_class(SameConv2d) is quantized_class(SameConv2d)
    assert quantized_class(nn.Linear) is QuantLinear


def test_a_subclass_keeps_its_helpers():
    class Helpful(nn.Linear):
        def rows(self) -> int:
            return self.out_features

    kind = quantized_class(Helpful)
    assert issubclass(kind, QuantLinear) and kind.forward is QuantLinear.forward
    assert with_quantizers(nn.Sequential(Helpful(3, 2)), Policy({"0": LayerBits(4, 4)}))[0].rows() == 2


def test_other_layers_are_an_error():
    with pytest.raises(BitscapeError, match="layer of class Bilinear: quantizable are Conv1d, Conv2d, Conv3d, ConvTranspose1d"):
        quantized_class(nn.Bilinear)


def test_a_shared_layer_is_listed_once_under_its_first_name():
    shared = nn.Linear(3, 3)
    model = with_quantizers(nn.Sequential(shared, nn.ReLU(), shared), Policy({"0": LayerBits(4, 4)}))
    assert list(quantized_layers(model)) == ["0"]
    assert model[0] is model[2]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_a_compiled_network_gives_the_same_results():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(2, 3, 6, 6)
    model = calibrate(with_quantizers(model, Policy({"0": LayerBits(3, 8), "3": LayerBits(1, 4)})), x)
    compiled = torch.compile(model)
    results = []
    for network in (model, compiled):
        model.zero_grad()
        y = network(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
