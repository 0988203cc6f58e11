from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.exporters.agreement import compare_outputs
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.tflite.file import TfliteInfo, save_tflite, tflite_network, write_tflite
from bitscape.exporters.tflite.flatbuffer import unpack_nibbles, unpacked
from bitscape.exporters.tflite.parity import check_tflite_parity
from bitscape.runtimes.litert import LiteRt
from tests.exporters import networks
from tests.exporters.networks import EIGHT, MIXED, Applied, head, images, made, other_images, quantized
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

runtime_or_skip("ai_edge_litert")

FOUR = ((4, 8),)
WORDS = ((8, 16), (8, 8), (4, 16))
EXACT = ("plain", "mobile", "residual", "fire", "repeated", "pyramid")
"""Here LiteRT computes what follows from the file bit for bit, beside layers too."""


def branched() -> nn.Module:
    """Operators between layers: gates, curves, both resizes, both pools, padding, parts and a sum that a constant scales."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.hardswish(net.stem(x))
        x = x * torch.sigmoid(net.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.pad(F.silu(net.body(x)), (1, 1, 1, 1), mode="reflect")
        left, right = net.wide(x).chunk(2, 1)
        left = F.interpolate(F.avg_pool2d(left, 2), scale_factor=2)
        right = F.interpolate(F.max_pool2d(right, 3, 2, 1), size=left.shape[2:], mode="bilinear")
        x = torch.cat([left, torch.tanh(right)], 1)
        x = F.leaky_relu(net.norm(x) * 0.5 + 0.25, 0.1) + F.hardsigmoid(x)
        return torch.softmax(net.head(x), 1)

    layers = {"stem": nn.Conv2d(3, 8, 3, padding=1), "gate": nn.Conv2d(8, 8, 1), "body": nn.Conv2d(8, 8, 3)}
    return Applied(forward, **layers, wide=nn.Conv2d(8, 16, 1), norm=nn.BatchNorm2d(16), head=nn.Sequential(*head(16)))


def transposed() -> nn.Module:
    """Transposed convolutions without padding, and with TensorFlow's; tokens; a permutation."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.up(F.relu(net.stem(x))))
        x = net.again(x).flatten(2).transpose(1, 2)
        return net.last(net.tokens(x).relu()).mean(1)

    ups = {"up": nn.ConvTranspose2d(8, 6, 2, 2), "again": nn.ConvTranspose2d(6, 4, 4, 2, 1)}
    return Applied(forward, stem=nn.Conv2d(3, 8, 3, 2), **ups, tokens=nn.Linear(4, 8), last=nn.Linear(8, 3))


OWN: dict[str, Callable[[], nn.Module]] = {"branched": branched, "transposed": transposed}


@cache
def integers(name: str, bits: tuple[tuple[int, int], ...]) -> tuple[nn.Module, IntegerNetwork]:
    network = quantized(made({**networks.ZOO, **OWN}[name]), bits=bits)
    return network, tflite_network(network, images())


def write(name: str, bits: tuple[tuple[int, int], ...], folder: Path, **settings: Any) -> TfliteInfo:
    return write_tflite(integers(name, bits)[1], folder / "net.tflite", images(), **settings)


def feeds(name: str, bits: tuple[tuple[int, int], ...]) -> Any:
    return integers(name, bits)[1].interface.feeds(other_images(), 8)


@pytest.mark.parametrize(("name", "bits"), [*((name, EIGHT) for name in (*EXACT, *OWN)), ("mobile", MIXED), ("pyramid", MIXED)])
def test_every_code_of_every_layer_is_that_of_exact_integers(
    name: str, bits: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    info = write(name, bits, tmp_path)
    report = check_tflite_parity(info.path, feeds(name, bits))
    assert {layer.name for layer in report.layers} >= set(info.containers)
    assert report.codes > 0 and report.differing_codes == 0 and not report.fixed_point


@pytest.mark.parametrize("name", EXACT)
def test_outputs_are_those_of_the_integer_network(name: str, tmp_path: Path) -> None:
    network, integer = integers(name, EIGHT)
    session = LiteRt().open(write(name, EIGHT, tmp_path).path)
    exact, simulated = compare_outputs(integer, network, session, images(8, seed=5))
    assert all(agreement.difference == 0 for agreement in exact.values())
    assert all(agreement.difference < 0.05 for agreement in simulated.values())


@pytest.mark.parametrize("name", OWN)
def test_operators_beside_layers_round_by_a_code_at_most(name: str, tmp_path: Path) -> None:
    network, integer = integers(name, EIGHT)
    exact, simulated = compare_outputs(integer, network, LiteRt().open(write(name, EIGHT, tmp_path).path), images(8, seed=5))
    assert exact["output0"].difference < 0.02 and simulated["output0"].difference < 0.06


@pytest.mark.parametrize("name", ["mobile", "pyramid"])
def test_int4_weights_stand_two_a_byte_and_convolutions_of_them_multiply_in_fixed_point(name: str, tmp_path: Path) -> None:
    bytes_of_int8 = write(name, FOUR, tmp_path).file_bytes
    info = write(name, FOUR, tmp_path, weights="int4")
    network = integers(name, FOUR)[1]
    narrow = {key: weight for key, weight in network.weights.items() if weight.bits <= 4}
    assert info.file_bytes < bytes_of_int8 and narrow
    model = unpacked(info.path.read_bytes())
    tensors = {tensor.name.decode(): tensor for tensor in model.subgraphs[0].tensors}
    for key, weight in narrow.items():
        data = model.buffers[tensors[key].buffer].data
        assert len(data) == -(-weight.q.numel() // 2)
        stored = unpack_nibbles(data, weight.q.numel()).reshape(tensors[key].shape)
        np.testing.assert_array_equal(np.sort(stored, None), np.sort(weight.q.numpy(), None))
    report = check_tflite_parity(info.path, feeds(name, FOUR))
    assert report.differing_codes == 0
    assert {layer.name for layer in report.fixed_point} <= {network.layers[key] for key in narrow} | {"boxes:2"}
    assert all(layer.largest == 1 for layer in report.fixed_point)


@pytest.mark.parametrize("name", ["plain", "residual", "fire"])
def test_16_bit_activations_are_int16(name: str, tmp_path: Path) -> None:
    network, integer = integers(name, WORDS)
    info = write(name, WORDS, tmp_path)
    kinds = {tensor.type for tensor in unpacked(info.path.read_bytes()).subgraphs[0].tensors}
    assert kinds >= {7, 9}  # INT16 and INT8
    assert check_tflite_parity(info.path, feeds(name, WORDS)).differing_codes == 0
    exact, simulated = compare_outputs(integer, network, LiteRt().open(info.path), images(8, seed=5))
    assert exact["output0"].difference < 0.01 and simulated["output0"].difference < 0.03


def test_negative_scales_behind_norms_turn_into_codes_without_changing_the_network(tmp_path: Path) -> None:
    network, integer = integers("mobile", MIXED)
    assert all(bool((weight.scale > 0).all()) for weight in integer.weights.values())
    x = images(4, seed=7)
    with torch.no_grad():
        simulated = network(x)
    (found,) = run_integers(integer, x).values()
    assert (found - simulated).norm() < 0.08 * simulated.norm()


def test_images_and_outputs_are_int8_with_channels_last(tmp_path: Path) -> None:
    graph = unpacked(write("repeated", EIGHT, tmp_path).path.read_bytes()).subgraphs[0]
    tensors = [graph.tensors[index] for index in (*graph.inputs, *graph.outputs)]
    assert [tensor.name.decode() for tensor in tensors] == ["x", "output0", "output1"]
    assert [list(tensor.shape) for tensor in tensors] == [[1, 8, 8, 3], [1, 5], [1, 6, 6, 8]]
    assert {tensor.type for tensor in tensors} == {9}


@pytest.mark.parametrize(("name", "reason"), [("convnext", "layer_norm in norm"), ("signals", "conv1d in body.0")])
def test_what_has_no_integer_operator_is_named(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BitscapeError, match=f"{reason} cannot be written to a TFLite file"):
        save_tflite(quantized(made(networks.ZOO[name])), tmp_path / "net.tflite", images())
    assert not list(tmp_path.iterdir())


def test_weights_are_stored_as_int8_or_int4(tmp_path: Path) -> None:
    with pytest.raises(BitscapeError, match="weights='int2'"):
        write("plain", EIGHT, tmp_path, weights="int2")


def test_export_writes_and_checks_a_file(tmp_path: Path) -> None:
    report = bs.export(integers("plain", FOUR)[0], tmp_path / "net.tflite", images(), weights="int4")
    assert report.parity is not None and report.parity.differing_codes == 0
    assert report.runtime is not None and report.runtime.startswith("litert ")
    assert report.exact["output0"].difference < 0.02
    assert report.info.containers == {"0": 8, "3": 4, "7": 4, "9": 4}  # a negative gamma turns -8 into 8
    assert report.file_bytes == (tmp_path / "net.tflite").stat().st_size
