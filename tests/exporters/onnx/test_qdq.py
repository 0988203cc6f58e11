import builtins
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.graph import grid_of, is_quantizer
from bitscape.exporters.integer.weights import input_scale
from bitscape.exporters.onnx.qdq import CONTAINERS, OPSETS, PORTABLE, save_onnx, write_onnx
from tests.exporters.networks import CASES, OUTPUTS_OF_HEADS, ZOO, Applied, exported, images, integers, one_graph, quantized
from tests.networks import conv_norm

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def loaded(name: str, bits=((8, 8),)):
    return onnx.load_from_string(exported(name, bits).content)


def constants(model) -> dict[str, np.ndarray]:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made = (node for node in model.graph.node if node.op_type == "Constant")
    return found | {node.output[0]: _value(node.attribute[0]) for node in made}


def _value(attribute) -> np.ndarray:
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.to_array(value) if attribute.name == "value" else np.array(value)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_file_holds_the_integers_of_the_network(name, bits):
    from bitscape.exporters.parity import read_layers

    integer = exported(name, bits).integer
    layers = {layer.name: layer for layer in read_layers(loaded(name, bits))}
    for key, weight in integer.weights.items():
        layer = layers[key.removesuffix(".weight")]
        codes = weight.q.transpose(0, 1) if layer.operator == "ConvTranspose" else weight.q  # outputs first
        assert np.array_equal(layer.weight, codes.numpy()) and np.array_equal(layer.weight_scale, weight.scale.numpy())
        assert layer.input_scale == np.float32(input_scale(integer.module.graph, key))
        bias = integer.biases.get(key, torch.zeros(1, dtype=torch.int64))
        assert np.array_equal(layer.bias, bias.numpy())
    assert set(layers) == {key.removesuffix(".weight") for key in integer.weights}


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_file_holds_the_quantizers_of_the_network(name, bits):
    model = loaded(name, bits)
    values, taken = constants(model), {node.input[0]: node for node in model.graph.node if node.input}
    found: Counter[tuple[float, int, int, int]] = Counter()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            after = taken[node.output[0]]
            low, high = (int(values[limit]) for limit in after.input[1:3]) if after.op_type == "Clip" else (0, 255)
            assert values[node.input[2]].dtype == np.uint8
            found[float(values[node.input[1]]), int(values[node.input[2]]), low, high] += 1
    grids = (grid_of(node) for node in exported(name, bits).integer.module.graph.nodes if is_quantizer(node))
    assert found == Counter((grid.scale, int(grid.zero_point), grid.qmin, grid.qmax) for grid in grids)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_file_is_a_valid_one_for_every_batch_size(name, bits):
    model = loaded(name, bits)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    (taken,) = model.graph.input
    assert taken.type.tensor_type.shape.dim[0].dim_param
    assert [dim.dim_value for dim in taken.type.tensor_type.shape.dim][1:] == [3, 8, 8]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_no_float_copy_of_a_quantized_weight_is_left(name, bits):
    shapes = {tuple(weight.q.shape) for weight in exported(name, bits).integer.weights.values()}
    floats = {"norm", "places", "token", "kernel", "up", "div"}  # the last a standardized weight
    for key, value in constants(loaded(name, bits)).items():
        if value.dtype == np.float32 and value.size > 64:
            assert key.split(".")[0] in floats, key
        if value.dtype == np.float32 and key.split(".")[0] not in floats:
            assert value.shape not in shapes and value.shape[::-1] not in shapes, key


@pytest.fixture(scope="module")
def every_width():
    """Layers of one and up to eight bits, side by side."""
    layers = {f"b{bits}": nn.Conv2d(3, 5, 3) for bits in range(1, 9)}
    network = Applied(lambda net, x: torch.cat([layer(x) for name, layer in net.named_children()], 1), **layers)
    return integer_network(quantized(network, bits=[(bits, 8) for bits in range(1, 9)]), images())


@pytest.mark.parametrize(
    ("widths", "expected"),
    [(CONTAINERS, [2, 2, 4, 4, 8, 8, 8, 8]), (PORTABLE, [4, 4, 4, 4, 8, 8, 8, 8]), ((8,), [8] * 8)],
)
def test_weights_lie_in_the_smallest_container(widths, expected, every_width, tmp_path):
    with one_graph(every_width):
        info = write_onnx(every_width, tmp_path / "net.onnx", images(), containers=widths)
    model = onnx.load(info.path)
    kinds = {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for bits, width in enumerate(expected, start=1):
        tensor = stored[f"b{bits}.weight.codes"]
        assert tensor.data_type == kinds[width] and len(tensor.raw_data) == -(-5 * 27 * width // 8)
    assert info.containers == {f"b{bits}": width for bits, width in enumerate(expected, start=1)}
    assert [node.op_type for node in model.graph.node].count("Cast") == sum(width < 8 for width in expected)
    assert (model.opset_import[0].version, model.ir_version) == OPSETS[min(expected)]
    assert info.container_bytes == sum(-(-5 * 27 * width // 8) + 4 * 5 + 4 * 5 for width in expected)
    assert (info.path, info.file_bytes, info.added) == (tmp_path / "net.onnx", info.path.stat().st_size, 0)


def test_a_network_is_saved_in_one_step(tmp_path):
    network = quantized(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()), bits=[(3, 8)])
    info = save_onnx(network, tmp_path / "saved.onnx", images(), containers=PORTABLE)
    assert info.containers == {"0": 4} and info.path.is_file()
    with pytest.raises(BitscapeError, match="no quantized layer"):
        save_onnx(nn.Sequential(nn.Conv2d(3, 5, 3)), tmp_path / "float.onnx", images())


def test_a_network_that_is_one_layer_goes_by_the_policy_s_name_for_it(tmp_path):
    network = quantized(torch.nn.Conv2d(3, 4, 1), bits=[(4, 8)])
    assert save_onnx(network, tmp_path / "one.onnx", images()).containers == {"": 4}


def test_containers_that_do_not_serve_are_refused(tmp_path):
    for widths in ((), (3, 8), (16,)):
        with pytest.raises(BitscapeError, match="ONNX stores integers of 2, 4, 8 bits"):
            write_onnx(integers("plain")[1], tmp_path / "net.onnx", images(), containers=widths)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A network whose weights outweigh its graph, at 2, 3 and 8 bits."""
    torch.manual_seed(0)
    layers = [*conv_norm(3, 32, 3), nn.ReLU(), *conv_norm(32, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64)]
    integer = integer_network(quantized(nn.Sequential(*layers), bits=[(8, 8), (2, 4), (3, 4)]), images())
    folder, before = tmp_path_factory.mktemp("large"), integer.module.code
    files = [write_onnx(integer, folder / name, images()) for name in ("first.onnx", "second.onnx")]
    assert integer.module.code == before  # writing changes nothing
    return files


def test_the_file_is_little_larger_than_what_it_holds(large):
    weights = 32 * 27 + 128 * 32 * 9 // 4 + 512 * 64 // 2
    assert large[0].container_bytes == weights + 2 * 4 * (32 + 128 + 64)
    assert large[0].file_bytes < large[0].container_bytes + 5000


def test_the_same_network_gives_the_same_bytes(large):
    assert large[0].path.read_bytes() == large[1].path.read_bytes()


def test_nodes_of_layers_carry_their_names():
    model = loaded("repeated")
    assert [node.name for node in model.graph.node if node.name] == ["stem", "twice", "twice:2", "head.2"]


def test_padding_belongs_to_the_convolution():
    operators = Counter(node.op_type for node in loaded("geometries").graph.node)
    assert operators["Pad"] == 2  # with mirrored pixels, and with repeated ones
    first = next(node for node in loaded("geometries").graph.node if node.name == "0")
    pads = next(attribute.ints for attribute in first.attribute if attribute.name == "pads")
    assert list(pads) == [0, 0, 1, 1]


def test_float_weights_keep_off_codes():
    """ONNX Runtime quantizes float weights that stand right behind a DequantizeLinear."""
    model = loaded("floats")
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    in_front = {node.name: makers[node.input[0]] for node in weighted}
    assert {in_front.pop(name) for name in ("stem", "up", "last")} == {"DequantizeLinear"}
    assert len(in_front) == 2 and "DequantizeLinear" not in in_front.values()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    _, integer = integers("plain")
    real = builtins.__import__

    def without(name, *args):
        if name.partition(".")[0] == "onnxscript":
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BitscapeError, match=r"onnxscript.*pip install 'bitscape\[onnx\]'"):
        write_onnx(integer, tmp_path / "net.onnx", images())
    assert not (tmp_path / "net.onnx").exists()


def test_inputs_and_outputs_keep_their_names():
    for name, given, outputs in (("heads", "pixels.input", OUTPUTS_OF_HEADS), ("repeated", "x", ("output0", "output1"))):
        graph = loaded(name).graph
        assert [value.name for value in graph.input] == [given]
        assert [value.name for value in graph.output] == list(outputs)
    assert [value.name for value in loaded("plain").graph.input] == ["input"]


def test_circular_padding_is_written_as_slices():
    operators = Counter(node.op_type for node in loaded("excited").graph.node)
    assert (operators["Pad"], operators["Slice"]) == (0, 4)


def test_every_structure_is_exported():
    assert {name for name, _ in CASES} == set(ZOO)
