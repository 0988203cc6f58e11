"""Activations of 16 bits, from the grid to files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.graph import ActivationGrid
from bitscape.exporters.onnx.qdq import save_onnx
from bitscape.exporters.openvino.ir import save_openvino
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.exporters.parity import check_parity
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.grid import Grid, grid
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact
from tests.exporters.networks import Applied, images
from tests.needs import runtime_or_skip


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 4, 1), "d": nn.Linear(4, 5)}

    def forward(net, x):
        x = F.relu(net.a(x))
        return net.d(F.relu6(net.c(F.relu(net.b(x) + x))).mean((2, 3)))

    return Applied(forward, **layers).eval()


def quantized(bits: tuple[int, ...], quantizer=None) -> nn.Module:
    policy = Policy({name: LayerBits(8, width) for name, width in zip("abcd", bits, strict=True)})
    return calibrate(with_quantizers(net(), policy, quantizer or Lsq()), images())


def test_the_grid_has_65536_codes():
    assert grid(16, signed=False) == Grid(0, 65535)
    assert grid(16, signed=True) == Grid(-32768, 32767)
    with pytest.raises(BitscapeError, match="bits = 12: a bit-width is an integer from 1 to 8, or 16 for activations"):
        grid(12, signed=True)


@pytest.mark.parametrize("quantizer", [Lsq(), LsqPlus(), Liq(), Pact(), Dorefa()], ids=lambda q: type(q).__name__)
def test_weights_take_no_16_bits_and_activations_do(quantizer):
    with pytest.raises(BitscapeError, match="weights take 1 to 8 bits"):
        quantizer.for_weight(torch.randn(2, 3), 16)
    fake, x = quantizer.for_activation(16), torch.linspace(-3, 5, 4001)
    fake.initialize(x, MinMax())
    assert float((fake(x) - x).detach().abs().max()) < 5 / 2**15


def test_codes_come_back_exactly():
    fake, codes = Lsq().for_activation(16), torch.arange(65536.0)
    fake.initialize(codes * 0.0137, MinMax())
    with torch.no_grad():
        fake.scale.fill_(0.0137)
        y = fake(codes * 0.0137 + 0.006)
    assert torch.equal((y / fake.scale).round(), codes)


def test_a_packed_file_gives_the_same_outputs(tmp_path):
    network = quantized((8, 16, 16, 8))
    save_packed(network, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(tmp_path / "net.safetensors", net())(images()), network(images()))


@pytest.mark.slow
def test_nothing_on_the_way_to_16_bits_is_rounded_to_8():
    network = quantized((16, 16, 16, 16))
    integers = integer_network(network, images())
    assert integers.added == {}
    torch.testing.assert_close(integers.module(images()), network(images()).detach(), rtol=1e-5, atol=1e-5)


def test_the_integer_form_is_a_word():
    wide, narrow = (ActivationGrid(scale=1.0, zero_point=0.0, qmin=0, qmax=top) for top in (65535, 255))
    assert (wide.top, narrow.top) == (65535, 255)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(16, 16, 16, 16), (8, 16, 8, 16)])
def test_onnx_runtime_computes_them_as_the_integers_say(bits, tmp_path):
    runtime_or_skip("onnxruntime")
    network = quantized(bits, LsqPlus())
    save_onnx(network, tmp_path / "net.onnx", images())
    report = check_parity(tmp_path / "net.onnx", images().numpy())
    report.require(0.0)
    assert {layer.name for layer in report.layers} == set("abcd")
    wide = {name for name, width in zip("abcd", bits, strict=True) if width == 16}
    assert wide <= set(report.float_outputs)
    assert np.all([layer.differing == 0 for layer in report.layers])


def test_an_export_to_openvino_is_refused_at_once(tmp_path):
    with pytest.raises(BitscapeError, match="network: layers b, d take 16-bit activations, and OpenVINO computes in 8"):
        bs.export(quantized((8, 16, 8, 16)), tmp_path / "net.xml", images())


def test_a_cap_on_the_mean_leaves_16_bits_to_a_few_layers():
    offered = [LayerBits(weight, bits) for weight in (4, 8) for bits in (8, 16)]
    caps = ["weight_bytes=6bit", "mean_activation_bits=10"]
    result = bs.search(net(), images(), caps, candidates=offered, pinned={})
    layers, elements = result.policy.layers, {"a": 192, "b": 512, "c": 512, "d": 4}
    wide = sum(size for name, size in elements.items() if layers[name].activation == 16)
    assert 0 < wide <= sum(elements.values()) * 2 / 8
    assert result.policy.cost["mean_activation_bits"] <= 10


@pytest.mark.slow
def test_openvino_files_are_refused_by_name(tmp_path):
    runtime_or_skip("openvino")
    with pytest.raises(BitscapeError, match="layers b take 16-bit activations, and OpenVINO computes in 8"):
        save_openvino(quantized((8, 16, 8, 8)), tmp_path / "net.xml", images())
