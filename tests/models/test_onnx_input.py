import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.models.find import find_model
from bitscape.models.layers import quantizable_layers
from bitscape.policy import uniform_policy

onnx = pytest.importorskip("onnx")
if importlib.util.find_spec("onnx2torch") is None:  # imported by `read_onnx`, behind torchvision
    pytest.skip("onnx2torch is not installed", allow_module_level=True)


def small_file(path: Path) -> dict[str, torch.Tensor]:
    """A convolution, a reshape by a Constant node, a product with bias; two outputs. Returns the weights."""
    from onnx import TensorProto, helper, numpy_helper

    generator = torch.Generator().manual_seed(0)
    shapes = {"kernel": (4, 3, 3, 3), "matrix": (5, 144), "bias": (5,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 144])
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["features"], name="stem", kernel_shape=[3, 3]),
        helper.make_node("Constant", [], ["shape"], name="constant", value=shape),
        helper.make_node("Reshape", ["features", "shape"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["scores"], name="head", transB=1),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 8, 8])
    outputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 4, 6, 6]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 5]),
    ]
    stored = [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", [pixels], outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return weights


def test_a_file_is_a_network_with_its_names(tmp_path):
    weights = small_file(tmp_path / "small.onnx")
    network = find_model(f"onnx:{tmp_path / 'small.onnx'}")
    assert not network.training and list(quantizable_layers(network)) == ["stem", "head"]
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = network(pixels=images)
    features = nn.functional.conv2d(images, weights["kernel"])
    torch.testing.assert_close(outputs["features"], features)
    torch.testing.assert_close(outputs["scores"], features.flatten(1) @ weights["matrix"].T + weights["bias"])


@pytest.mark.slow
def test_a_network_from_a_file_is_quantized_and_exported_under_its_names(tmp_path):
    small_file(tmp_path / "small.onnx")
    model = find_model(f"onnx:{tmp_path / 'small.onnx'}")
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network = bs.quantize(model, uniform_policy(["stem", "head"], bs.LayerBits(4, 8)), images)
    report = bs.export(network, tmp_path / "int.onnx", images)
    assert set(report.exact) == {"features", "scores"}
    assert [entry.name for entry in onnx.load(tmp_path / "int.onnx").graph.input] == ["pixels"]


def test_a_file_for_one_sample_takes_several(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [3], [1, 4, -1])
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["features"], name="stem", kernel_shape=[3, 3]),
        helper.make_node("Reshape", ["features", "sizes"], ["cells"], name="flatten"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 8, 8])
    cells = helper.make_tensor_value_info("cells", TensorProto.FLOAT, [1, 4, 36])
    graph = helper.make_graph(nodes, "one", [pixels], [cells], [numpy_helper.from_array(kernel.numpy(), "kernel"), sizes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "one.onnx")
    network = find_model(f"onnx:{tmp_path / 'one.onnx'}")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(images), nn.functional.conv2d(images, kernel).flatten(2))


@pytest.mark.parametrize(("content", "said"), [(b"no protobuf", "no readable ONNX file"), (None, "no readable ONNX file")])
def test_what_is_no_onnx_file_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(BitscapeError, match=said):
        find_model(f"onnx:{tmp_path / 'bad.onnx'}")


def test_an_operator_that_cannot_be_converted_is_named(tmp_path):
    from onnx import TensorProto, helper

    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "odd", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "odd.onnx")
    with pytest.raises(BitscapeError, match=r"onnx2torch cannot convert it \(.*Det"):
        find_model(f"onnx:{tmp_path / 'odd.onnx'}")


@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resizes_by_stored_numbers_are_those_of_torch(tmp_path, by):
    from onnx import TensorProto, helper, numpy_helper

    kernel = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    numbers = {
        "scales": helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, 2, 3]),
        "sizes": helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 4, 16, 24]),
    }[by]
    taken = ["features", "", "scales"] if by == "scales" else ["features", "", "", "sizes"]
    settings = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["features"], name="stem", kernel_shape=[1, 1]),
        helper.make_node("Resize", taken, ["larger"], name="resize", **settings),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 8, 8])
    larger = helper.make_tensor_value_info("larger", TensorProto.FLOAT, ["n", 4, 16, 24])
    graph = helper.make_graph(nodes, "larger", [pixels], [larger], [numpy_helper.from_array(kernel.numpy(), "kernel"), numbers])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "larger.onnx")
    network = find_model(f"onnx:{tmp_path / 'larger.onnx'}")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    features = nn.functional.conv2d(images, kernel)
    expected = features.repeat_interleave(2, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(network(images), expected)
    assert not any(type(module).__name__ == "OnnxResize" for name, module in network.named_modules() if name in called(network))


def called(network: nn.Module) -> set[str]:
    return {str(node.target) for node in network.graph.nodes if node.op == "call_module"}


def saved(path: Path, nodes, stored: dict[str, torch.Tensor], shape) -> Path:
    """A file from "x" to "y"; a node is its kind, what it reads, what it makes, and attributes."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node(kind, reads, [made], made, **about) for kind, reads, made, about in nodes],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path
    )
    return path


def test_a_product_with_a_stored_matrix_and_a_stored_vector_added_is_a_linear_layer(tmp_path):
    stored = {"matrix": torch.randn(6, 4), "bias": torch.randn(4)}
    nodes = [("MatMul", ["x", "matrix"], "product", {}), ("Add", ["product", "bias"], "y", {})]
    network = find_model(f"onnx:{saved(tmp_path / 'a.onnx', nodes, stored, ['n', 6])}")
    (layer,) = quantizable_layers(network).values()
    assert isinstance(layer, nn.Linear) and layer.bias is not None
    x = torch.randn(3, 6)
    torch.testing.assert_close(network(x), x @ stored["matrix"] + stored["bias"])


def test_slices_and_reshapes_by_a_shape_can_be_traced(tmp_path):
    numbers = {"starts": [1], "ends": [9], "axes": [3], "first": [0], "second": [1], "rest": [-1]}
    stored = {name: torch.tensor(value) for name, value in numbers.items()}
    nodes = [
        ("Slice", ["x", "starts", "ends", "axes"], "cut", {}),
        ("Shape", ["cut"], "shape", {}),
        ("Slice", ["shape", "first", "second"], "samples", {}),
        ("Concat", ["samples", "rest"], "sizes", {"axis": 0}),
        ("Reshape", ["cut", "sizes"], "y", {}),
    ]
    network = find_model(f"onnx:{saved(tmp_path / 'b.onnx', nodes, stored, ['n', 3, 4, 5])}")
    x = torch.randn(2, 3, 4, 5)
    expected = x[..., 1:].flatten(1)
    assert torch.equal(network(x), expected)
    batch = torch.export.Dim("batch", min=2, max=8)
    traced = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 4, 5)
    assert torch.equal(traced.module()(more), more[..., 1:].flatten(1))
