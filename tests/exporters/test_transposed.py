"""Transposed and 3-d convolutions in files: each layer's codes as exact integers say, in either runtime."""

from functools import cache

import pytest
import torch
from torch import nn

from bitscape.exporters.agreement import compare_outputs
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.onnx.qdq import write_onnx
from bitscape.exporters.openvino.ir import write_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.exporters.parity import check_parity
from bitscape.runtimes.sessions import OnnxRuntime, OpenVino
from tests.exporters.networks import made, one_graph, quantized
from tests.needs import runtime_or_skip


def decoder() -> nn.Module:
    """Of all channels together, of groups and of single ones."""

    def up(groups: int) -> list[nn.Module]:
        layer = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(8), nn.ReLU()]

    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *up(1), *up(2), *up(8), nn.Conv2d(8, 4, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Sigmoid())


def volumes() -> nn.Module:
    body = [nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 8, (1, 2, 2), bias=False), nn.BatchNorm3d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.ConvTranspose3d(8, 2, 2, stride=2))


def upsampler() -> nn.Module:
    """A transposed convolution whose results are the output."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2, 2))


CASES = {"decoder": (decoder, 2), "volumes": (volumes, 3), "last": (upsampler, 2)}


@cache
def integers(name: str) -> tuple[nn.Module, IntegerNetwork, torch.Tensor]:
    """A quantized network, its integers and what it is called with."""
    build, dims = CASES[name]
    network, x = quantized(made(build), examples(dims)), examples(dims)
    return network, integer_network(network, x), x


def examples(dims: int) -> torch.Tensor:
    return torch.randn(6, 3, *[4] * dims, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_computes_them_as_the_integers_say(name, tmp_path):
    runtime_or_skip("onnxruntime")
    (network, integer, x), path = integers(name), tmp_path / "net.onnx"
    with one_graph(integer):
        write_onnx(integer, path, x)
    report = check_parity(path, x.numpy())
    report.require(0.0)
    transposed = {name for name, layer in network.named_modules() if "ConvTranspose" in type(layer).__name__}
    assert transposed <= {layer.name for layer in report.layers} and set(report.float_outputs) == transposed
    (agreement,) = compare_outputs(integer, network, OnnxRuntime().open(path), x)[0].values()
    assert agreement.difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_openvino_computes_them_as_the_integers_say(name, tmp_path):
    runtime_or_skip("openvino")
    (network, integer, x), path = integers(name), tmp_path / "net.xml"
    with one_graph(integer):
        source = write_openvino(integer, path, x).source
    report = check_openvino_parity(path, source, x.numpy())
    report.require(1e-3)
    assert len(report.layers) == len(integer.weights)
    (agreement,) = compare_outputs(integer, network, OpenVino().open(path), x)[0].values()
    assert agreement.difference < 1e-3


@pytest.mark.parametrize(("build", "dims"), CASES.values(), ids=CASES)
def test_packed_files_give_the_same_outputs_and_hold_output_channels_first(build, dims, tmp_path):
    from safetensors.torch import load_file

    model, x = made(build), examples(dims)
    network, path = quantized(model, x), tmp_path / "net.safetensors"
    save_packed(network, path)
    assert torch.equal(load_packed(path, model)(x), network(x))
    last = next(reversed([name for name, layer in model.named_modules() if "ConvTranspose" in type(layer).__name__]))
    layer, tensors = model.get_submodule(last), load_file(path)
    assert tensors[f"{last}.weight_shape"].tolist() == [layer.out_channels, layer.in_channels, *layer.kernel_size]
    assert tensors[f"{last}.weight_scale"].shape == (layer.out_channels, 1)
