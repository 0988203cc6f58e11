import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.onnx.qdq import save_onnx
from bitscape.exporters.parity import ALLOWED, LayerParity, ParityReport, _Graph, check_parity, read_layers
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.runtimes.sessions import RUNTIMES, OnnxRuntime
from tests.exporters.networks import CASES, MIXED, Applied, exported, other_images
from tests.needs import runtime_or_skip
from tests.runtimes.test_sessions import with_float_layer

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
IMAGES = other_images().numpy()


@pytest.fixture
def file_of(tmp_path):
    def write(name: str, bits=((8, 8),)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(exported(name, bits).content)
        return path

    return write


class Otherwise:
    """A runtime that computes another file than it is given."""

    version = "otherwise 1.0"

    def __init__(self, runtime, change) -> None:
        self.runtime, self.change = runtime, change

    def open(self, model):
        model = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        self.change(model)
        return self.runtime.open(model.SerializeToString())


def changed(change, *names: str):
    """Change constants, in place."""

    def apply(model) -> None:
        found = [tensor for tensor in model.graph.initializer if tensor.name in names]
        assert len(found) == len(names)
        for tensor in found:
            value = onnx.numpy_helper.to_array(tensor).copy()
            change(value.reshape(-1))
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))

    return apply


def one_more(values) -> None:
    values[0] += 1 if values[0] < 7 else -1


def doubled(values) -> None:
    values[0] *= 2


def much_more(values) -> None:
    values[0] += 4000


def another_limit(model) -> None:
    """One code less behind a layer's quantizer."""
    takes = {name: node for node in model.graph.node for name in node.input}
    layer = next(node for node in model.graph.node if node.name == "3.body.0")
    clip = takes[takes[layer.output[0]].output[0]]
    old = next(tensor for tensor in model.graph.initializer if tensor.name == clip.input[2])
    model.graph.initializer.append(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(old) - np.uint8(1), "another_limit"))
    clip.input[2] = "another_limit"


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_onnx_runtime_computes_every_layer_as_integers_say(name, bits, file_of):
    report = check_parity(file_of(name, bits), IMAGES)
    assert report.runtime.startswith("onnxruntime ")
    assert (report.differing, report.float_layers) == (0.0, ())
    report.require(ALLOWED["onnxruntime"])
    assert {layer.name for layer in report.layers} == {key.removesuffix(".weight") for key in exported(name, bits).integer.weights}
    assert all(layer.codes > 0 and layer.largest == 0 for layer in report.layers)


@pytest.mark.parametrize("name", ["mobile", "geometries", "products", "convnext", "signals", "floats", "repeated", "fire", "pyramid"])
def test_openvino_computes_nearly_every_code_as_integers_say(name, file_of):
    runtime_or_skip("openvino")
    report = check_parity(file_of(name), IMAGES, RUNTIMES["openvino"]())
    report.require(ALLOWED["openvino"])
    assert report.runtime.startswith("openvino ")


@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
@pytest.mark.parametrize(
    ("layer", "change"),
    [
        ("3.body.3", changed(one_more, "3.body.3.weight.codes")),
        ("3.body.0", changed(doubled, "3.body.0.weight.scale", "3.body.0.bias.scale")),
        ("4.0", changed(much_more, "4.0.bias.codes")),
        ("7", changed(much_more, "7.bias.codes")),
        ("7", changed(one_more, "7.weight.codes")),
        ("3.body.0", another_limit),
    ],
    ids=["a weight", "a weight scale", "a bias", "a bias of float results", "a weight of float results", "a limit"],
)
def test_a_runtime_that_computes_one_layer_otherwise_is_found_out(runtime, layer, change, file_of):
    runtime_or_skip(runtime)
    path = file_of("mobile", MIXED)
    report = check_parity(path, IMAGES, Otherwise(RUNTIMES[runtime](), change))
    wrong = [found.name for found in report.layers if found.differing > ALLOWED[runtime] * found.codes or found.largest > 1]
    assert wrong == [layer]  # others are judged by the codes they got
    with pytest.raises(BitscapeError, match=rf"computes 1 of 8 layers otherwise .* worst {layer}: \d+ of \d+ codes differ"):
        report.require(ALLOWED[runtime])


@pytest.mark.usefixtures("exact_kernels")
def test_the_bias_behind_a_product_of_tokens_counts(file_of):
    path = file_of("products")
    assert [layer.name for layer in read_layers(onnx.load(path)) if layer.float_bias] == ["a", "c"]
    report = check_parity(path, IMAGES, Otherwise(OnnxRuntime(), changed(much_more, "a.bias.codes")))
    assert [found.name for found in report.layers if found.differing] == ["a"]


def test_a_layer_in_float_is_reported(file_of):
    runtime_or_skip("onnxruntime")
    path = file_of("plain")
    path.write_bytes(with_float_layer(path.read_bytes(), "3"))
    report = check_parity(path, IMAGES)
    assert report.float_layers == ("3",)
    with pytest.raises(BitscapeError, match=r"computes 1 layers in float \(3\), as it made one operator of them"):
        report.require(1.0)


@pytest.mark.usefixtures("exact_kernels")
def test_a_convolution_whose_results_are_outputs_may_run_in_float_and_is_compared(file_of):
    path = file_of("heads")
    report = check_parity(path, IMAGES)
    assert (report.float_layers, set(report.float_outputs)) == ((), {"body", "boxes", "scores", "masks", "tap"})
    report.require(0.0)
    wrong = check_parity(path, IMAGES, Otherwise(OnnxRuntime(), changed(one_more, "scores.weight.codes")))
    assert [layer.name for layer in wrong.layers if layer.differing] == ["scores"]


def test_layers_in_front_of_float_layers_compute_with_integers(tmp_path):
    """Of rows and of tokens: the second or the third of three layers stays float."""
    runtime_or_skip("onnxruntime")
    kinds = {"rows": [nn.ReLU, nn.Sigmoid, nn.ReLU], "tokens": [nn.ReLU, nn.GELU, nn.LeakyReLU]}
    floats = {"rows.0.2", "rows.1.4", "rows.2.4", "tokens.0.4", "tokens.1.2", "tokens.2.2"}

    def chain(rectifier):
        return nn.Sequential(nn.Linear(8, 8), rectifier(), nn.Linear(8, 8), rectifier(), nn.Linear(8, 3))

    def forward(net, x):
        rows = torch.cat([chain(x[:, 0]) for chain in net.rows], 1)
        return rows, torch.cat([chain(x) for chain in net.tokens], 2)

    torch.manual_seed(0)
    chains = {name: nn.ModuleList(map(chain, rectifiers)) for name, rectifiers in kinds.items()}
    model = Applied(forward, **chains).eval()
    layers = set(layer_shapes(model))
    policy = Policy(dict.fromkeys(layers, LayerBits(8, 8)) | dict.fromkeys(floats, LayerBits.FLOAT))
    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
    save_onnx(calibrate(with_quantizers(model, policy), x), tmp_path / "net.onnx", x)
    report = check_parity(tmp_path / "net.onnx", x.numpy())
    report.require(0.0)
    assert {layer.name for layer in report.layers} == layers - floats
    assert report.float_layers == report.float_outputs == ()


def test_float_branches_that_meet_again_are_followed_once():
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes, last = [make("MatMul", ["x", "w"], ["0"], name="layer")], "0"
    for index in range(60):  # 2^60 ways
        nodes += [make("Relu", [last], [f"r{index}"]), make("Add", [last, f"r{index}"], [f"a{index}"])]
        last = f"a{index}"
    for outputs, expected in (([info(last, 1, None)], True), ([], False)):
        graph = _Graph(onnx.helper.make_model(onnx.helper.make_graph(nodes, "diamonds", [info("x", 1, None)], outputs)))
        assert graph._becomes_output(nodes[0]) is expected


def test_a_file_without_integer_layers_is_refused(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])), tmp_path / "relu.onnx")
    with pytest.raises(BitscapeError, match=r"relu\.onnx: it has no layer of integer weights"):
        check_parity(tmp_path / "relu.onnx", IMAGES)


def report_of(**layers: tuple[int, int, int]) -> ParityReport:
    found = (LayerParity(name=name, codes=codes, differing=wrong, largest=most) for name, (codes, wrong, most) in layers.items())
    return ParityReport(runtime="some 1.0", layers=tuple(found), float_layers=())


def test_what_is_allowed_is_allowed_to_each_layer():
    good = report_of(a=(1000, 1, 1), b=(1000, 0, 0))
    good.require(1e-3)
    assert good.differing == 0.0005
    with pytest.raises(BitscapeError, match=r"some 1\.0 computes 1 of 2 layers otherwise .* worst a: 1 of 1000 codes differ, by up to 1"):
        good.require(0.0)
    with pytest.raises(BitscapeError, match="worst a"):
        report_of(a=(1000, 2, 1), b=(100000, 0, 0)).require(1e-3)


def test_a_code_off_by_two_is_never_allowed():
    with pytest.raises(BitscapeError, match=r"worst b: 1 of 1000 codes differ, by up to 2"):
        report_of(a=(1000, 900, 1), b=(1000, 1, 2)).require(1.0)


def test_the_reference_is_the_definition():
    """One number through one layer of the file, by hand."""
    layer = next(layer for layer in read_layers(onnx.load_from_string(exported("mobile", MIXED).content)) if layer.name == "0")
    codes = np.full((1, 3, 8, 8), 200, np.uint8)
    sums = (200 - layer.input_zero_point) * layer.weight[:, :, 1:, 1:].astype(np.int64).sum(
        (1, 2, 3)
    ) + layer.bias  # at the upper left pixel
    multiplier = layer.input_scale * layer.weight_scale / layer.output_scale
    expected = (np.rint(sums.astype(np.float32) * multiplier) + layer.output_zero_point).clip(layer.low, layer.high)
    output = np.zeros((1, 8, 8, 8), np.uint8)
    assert np.array_equal(layer.difference(codes, output)[0, :, 0, 0], expected)


def test_float_results_may_be_off_by_float32s_rounding_alone():
    layer = next(layer for layer in read_layers(onnx.load_from_string(exported("mobile").content)) if layer.name == "7")
    codes = np.random.default_rng(0).integers(0, 256, (4, 12), dtype=np.uint8)
    sums = (codes.astype(np.int64) - layer.input_zero_point) @ layer.weight.T.astype(np.int64) + layer.bias
    exact = sums * (layer.input_scale * layer.weight_scale).astype(np.float64)
    assert not layer.difference(codes, exact.astype(np.float32)).any()
    spacing = layer.input_scale * layer.weight_scale
    assert (layer.difference(codes, (exact + 3 * spacing).astype(np.float32)) == 3).all()
