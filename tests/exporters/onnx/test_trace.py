import numpy as np
import pytest
import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import export_program
from bitscape.exporters.integer.interface import Interface
from bitscape.exporters.onnx.trace import checked_bytes, onnx_graph, pool_globally

pytestmark = pytest.mark.slow

ir = pytest.importorskip("onnx_ir", reason="pip install 'bitscape[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


def mean_graph(axes: list[int], keepdims: int = 1, rank: int = 4) -> "ir.Graph":
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape([2, 3, 4, 5][:rank]))
    chosen = ir.Value(name="axes", const_value=ir.tensor(np.array(axes), name="axes"))
    node = ir.node("ReduceMean", [x, chosen], {"keepdims": keepdims})
    return ir.Graph([x], node.outputs, nodes=[node], initializers=[chosen], opset_imports={"": 18})


def test_a_mean_over_all_pixels_becomes_a_pooling():
    for axes in ([2, 3], [-1, -2]):
        graph = mean_graph(axes)
        pool_globally(graph[0])
        assert [node.op_type for node in graph] == ["GlobalAveragePool"]
        assert graph.outputs[0].producer() is graph[0]


@pytest.mark.parametrize("case", [([1, 2], 1, 4), ([2], 1, 4), ([2, 3], 0, 4), ([1, 2], 1, 3)], ids=str)
def test_other_means_stay(case):
    graph = mean_graph(*case)
    pool_globally(graph[0])
    assert [node.op_type for node in graph] == ["ReduceMean"]


def test_the_batch_is_free_or_that_of_the_images():
    images = torch.zeros(2, 3, 4, 4)
    interface = Interface.of(Mean(), Samples.of(images))
    module = export_program(Mean(), interface, images).module(check_guards=False)
    sizes = [
        onnx_graph(module, interface, images, {}, opset=18, free_batch=free).graph.inputs[0].shape[0] for free in (True, False)
    ]
    assert not isinstance(sizes[0], int)
    assert sizes[1] == 2


def test_what_torch_and_onnxscript_print_is_kept_from_the_output(monkeypatch, capsys):
    real = torch.onnx.export

    def printing(*args, **settings):
        print("Applied 8 of general pattern rewrite rules.")  # as onnxscript 0.6 does
        return real(*args, **settings)

    monkeypatch.setattr(torch.onnx, "export", printing)
    images = torch.zeros(2, 3, 4, 4)
    module = torch.export.export(Mean(), (images,)).module(check_guards=False)
    onnx_graph(module, Interface.of(Mean(), Samples.of(images)), images, {}, opset=18, free_batch=False)
    assert capsys.readouterr().out == ""


def test_an_invalid_model_is_an_error():
    node = onnx.helper.make_node("Relu", ["nowhere"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output]))
    with pytest.raises(BitscapeError, match="the ONNX graph is not valid"):
        checked_bytes(model)
