import shutil
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.openvino.ir import OpenvinoInfo, write_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.parity import ALLOWED, ParityReport
from bitscape.runtimes.sessions import OpenVino
from tests.exporters.networks import CASES, Applied, images, integers, made, one_graph, other_images, quantized
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

openvino = runtime_or_skip("openvino")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")

    @cache
    def write(name: str, bits: tuple[tuple[int, int], ...]) -> OpenvinoInfo:
        network = integers(name, bits)[1]
        with one_graph(network):
            return write_openvino(network, folder / f"{name}-{len(bits)}.xml", images())

    return write


@pytest.fixture
def file_of(written, tmp_path):
    """Writes a network's file once, and gives each test a copy that it may change."""

    def copied(name: str, bits=((8, 8),)) -> OpenvinoInfo:
        info = written(name, bits)
        path = tmp_path / f"{name}.xml"
        for suffix in (".xml", ".bin"):
            shutil.copy(info.path.with_suffix(suffix), path.with_suffix(suffix))
        return replace(info, path=path)

    return copied


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_layer_is_compared_and_nearly_every_code_is_that_of_integers(name, bits, file_of):
    network, info = integers(name, bits)[1], file_of(name, bits)
    report = check_openvino_parity(info.path, info.source, other_images().numpy())
    report.require(ALLOWED["openvino"])
    assert report.runtime.startswith("openvino ")
    assert {layer.name for layer in report.layers} == {key.removesuffix(".weight") for key in network.weights}
    assert all(layer.codes > 0 for layer in report.layers)


def test_layers_in_float_are_named(file_of):
    """OpenVINO computes products in float that take one weight; the file has one for each."""
    info = file_of("repeated")
    model = openvino.Core().read_model(info.path)
    products = {node.get_friendly_name().partition("/")[0]: node for node in model.get_ops() if node.get_type_name() == "Convolution"}
    products["twice:2"].input(1).replace_source_output(products["twice"].input_value(1))
    replace_file(info.path, model)
    report = check_openvino_parity(info.path, info.source, other_images().numpy())
    assert "twice" in report.float_layers
    with pytest.raises(BitscapeError, match=r"computes [12] layers? in float \(twice"):
        report.require(ALLOWED["openvino"])


def replace_file(path: Path, model) -> None:
    openvino.save_model(model, path.with_name("edited.xml"), compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        path.with_suffix(suffix).write_bytes(path.with_name(f"edited{suffix}").read_bytes())


def edited(path: Path, find, change) -> None:
    """Change the constants of a file that `find` accepts, in place."""
    model = openvino.Core().read_model(path)
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant" and find(node)]
    assert found
    for node in found:
        values = change(np.array(node.data))
        constant = openvino.opset13.constant(values, dtype=node.get_element_type())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(constant.output(0))
    replace_file(path, model)


def one_more(values):
    values.reshape(-1)[0] += 3 if values.reshape(-1)[0] < 100 else -3
    return values


def wrong(report: ParityReport) -> list[str]:
    return [layer.name for layer in report.layers if layer.differing > ALLOWED["openvino"] * layer.codes or layer.largest > 1]


def feeds(layer: str, kind: str):
    """Whether a constant of a kind goes, perhaps through others, into the product of a layer only."""

    def found(node) -> bool:
        while True:
            users = [target.get_node() for target in node.output(0).get_target_inputs()]
            if len(users) != 1:
                return False
            if users[0].get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
                return kind == "weight" and users[0].get_friendly_name().partition("/")[0] == layer
            if users[0].get_type_name() == "Add":
                return kind == "bias" and users[0].get_friendly_name().partition("/")[0] == layer
            node = users[0]

    return lambda node: node.get_element_type() in (openvino.Type.i8, openvino.Type.f32) and node.data.size > 4 and found(node)


@pytest.mark.parametrize(
    ("layer", "kind", "change"),
    [
        ("3.body.3", "weight", lambda values: values if values.dtype != np.int8 else one_more(values)),
        ("3.body.0", "weight", lambda values: values if values.dtype != np.float32 else 2 * values),
        ("4.0", "bias", lambda values: values + np.float32(3)),
        ("7", "bias", lambda values: values + np.float32(3)),
    ],
    ids=["a weight", "weight scales", "biases", "biases of float results"],
)
def test_a_file_that_computes_one_layer_otherwise_is_found_out(layer, kind, change, file_of):
    info = file_of("mobile")
    edited(info.path, feeds(layer, kind), change)
    report = check_openvino_parity(info.path, info.source, other_images().numpy())
    assert wrong(report) == [layer]  # others are judged by the codes they got
    with pytest.raises(BitscapeError, match=rf"computes 1 of 8 layers otherwise .* worst {layer}: \d+ of \d+ codes differ"):
        report.require(ALLOWED["openvino"])


def test_a_token_joined_to_patches_by_the_batch_size_is_computed_as_integers_say(tmp_path):
    """OpenVINO miscomputes the ONNX form of this network, and not its own."""

    def forward(net, x):
        patches = net.embed(x).flatten(2).mT
        tokens = torch.cat([net.token.weight.expand(x.shape[0], -1, -1), patches], dim=1)
        return net.head(net.norm(tokens).mean(1))

    def build():
        parts = {"embed": torch.nn.Conv2d(3, 8, 4, 4), "token": torch.nn.Embedding(1, 8), "norm": torch.nn.LayerNorm(8)}
        return Applied(forward, **parts, head=torch.nn.Linear(8, 5))

    network = integer_network(quantized(made(build)), images())
    info = write_openvino(network, tmp_path / "net.xml", images())
    check_openvino_parity(info.path, info.source, other_images().numpy()).require(ALLOWED["openvino"])


@pytest.mark.parametrize("kind", ["gated", "scaled", "norm"])
def test_a_mean_of_what_constants_scale_is_computed_as_integers_say(kind, tmp_path):
    """OpenVINO moves the constants through the mean into the quantizer behind it; only the whole outputs tell."""

    def forward(net, x):
        tokens = net.embed(x).flatten(2).mT
        gain = net.gain.weight[0]
        tokens = {"gated": tokens.sigmoid() * gain, "scaled": net.mix(tokens) * gain, "norm": net.norm(tokens)}[kind]
        return net.head(tokens.mean(1))

    def build():
        parts = {"embed": torch.nn.Conv2d(3, 8, 2, 2), "gain": torch.nn.Embedding(1, 8), "norm": torch.nn.RMSNorm(8)}
        return Applied(forward, **parts, mix=torch.nn.Linear(8, 8), head=torch.nn.Linear(8, 5))

    network = made(build)
    with torch.no_grad():
        network.norm.weight.uniform_(0.2, 3)
    ready = integer_network(quantized(network, bits=[(8, 8)]), images())
    info = write_openvino(ready, tmp_path / "net.xml", images())
    (found,) = OpenVino().open(info.path).run(other_images().numpy())
    expected = run_integers(ready, other_images())["output0"].numpy()
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_a_file_of_another_network_is_refused(file_of):
    with pytest.raises(BitscapeError, match=r"layer stem: the OpenVINO file has no such layer"):
        check_openvino_parity(file_of("mobile").path, file_of("fire").source, images().numpy())


def test_layers_with_slashes_in_their_names_are_compared(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict([("Conv/0", nn.Conv2d(3, 8, 3)), ("Relu/0", nn.ReLU()), ("Conv", nn.Conv2d(8, 4, 1))]))
    x = images()
    report = bs.export(quantized(model, x, [(4, 8)]), tmp_path / "net.xml", x)
    assert [layer.name for layer in report.parity.layers] == ["Conv/0", "Conv"]
    assert report.parity.float_layers == () and report.parity.differing_codes == 0
