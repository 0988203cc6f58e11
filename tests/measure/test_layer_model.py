import math

import numpy as np
import pytest
import torch
from torch import nn

from bitscape.exporters.onnx.qdq import CONTAINERS, PORTABLE
from bitscape.measure.layer_model import MOST_COPIES, MOST_WEIGHTS, LayerForm, LayerModel, form_of, without_layers
from bitscape.policy import LayerBits
from bitscape.runtimes.sessions import RUNTIMES
from tests.needs import runtime_or_skip

CONV = {"operator": "Conv", "strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
FORMS = {
    "conv": LayerForm(weight_shape=(8, 4, 3, 3), input_shape=(2, 4, 6, 6), **CONV),
    "depthwise": LayerForm(weight_shape=(8, 1, 3, 3), input_shape=(1, 8, 7, 7), groups=8, **{**CONV, "strides": (2, 2)}),
    "dilated": LayerForm(weight_shape=(8, 4, 3, 3), input_shape=(1, 4, 9, 9), **{**CONV, "dilations": (2, 2)}),
    "conv1d": LayerForm(operator="Conv", weight_shape=(8, 4, 3), input_shape=(1, 4, 9), strides=(1,), pads=(1, 1), dilations=(1,)),
    "gemm": LayerForm(operator="Gemm", weight_shape=(10, 16), input_shape=(2, 16)),
    "matmul": LayerForm(operator="MatMul", weight_shape=(12, 16), input_shape=(2, 5, 16)),
}


class _TensorFlowPadded(nn.Conv2d):
    """Pads by itself, one row more at the end."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("layer", "shape", "pads"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 8, 8), (1, 1, 1, 1)),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 8, 8), (1, 1, 1, 1)),
        (nn.Conv2d(3, 8, (3, 5), padding=(1, 2)), (1, 3, 8, 8), (1, 2, 1, 2)),
        (nn.Conv2d(3, 8, (3, 5), padding="same"), (1, 3, 8, 8), (1, 2, 1, 2)),
        (nn.Conv2d(3, 8, 3, dilation=2, padding="valid"), (1, 3, 8, 8), (0, 0, 0, 0)),
        (_TensorFlowPadded(3, 8, 3, stride=2), (1, 3, 8, 8), (0, 0, 1, 1)),
        (nn.Conv1d(3, 8, 5, padding=2), (4, 3, 9), (2, 2)),
    ],
)
def test_the_form_of_a_convolution_gives_outputs_of_its_size(layer, shape, pads):
    outputs = layer(torch.zeros(shape)).shape
    form = form_of(layer, shape, outputs)
    assert (form.pads, form.input_shape, form.strides, form.dilations) == (pads, shape, layer.stride, layer.dilation)
    rank = len(shape) - 2
    for axis in range(rank):
        padded = shape[2 + axis] + form.pads[axis] + form.pads[rank + axis]
        kernel = form.dilations[axis] * (form.weight_shape[2 + axis] - 1) + 1
        assert (padded - kernel) // form.strides[axis] + 1 == outputs[2 + axis]


def test_linear_layers_are_gemm_in_two_dimensions_and_matmul_in_more():
    layer = nn.Linear(16, 12)
    assert form_of(layer, (4, 16), (4, 12)).operator == "Gemm"
    assert form_of(layer, (16,), (12,)).input_shape == (1, 16)
    tokens = form_of(layer, (4, 5, 16), (4, 5, 12))
    assert (tokens.operator, tokens.weight_shape, tokens.input_shape) == ("MatMul", (12, 16), (4, 5, 16))


def test_a_call_without_a_batch_is_one_of_a_batch_of_one():
    assert form_of(nn.Conv2d(3, 8, 3), (3, 8, 8), (8, 6, 6)) == form_of(nn.Conv2d(3, 8, 3), (1, 3, 8, 8), (1, 8, 6, 6))


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (512, 512, 3, 3), (4096, 25088)])
def test_copies_are_as_many_as_have_room(shape):
    copies = LayerForm(operator="Conv", weight_shape=shape, input_shape=(1, 1, 1, 1)).copies
    assert 1 <= copies <= MOST_COPIES
    assert copies == 1 or copies * math.prod(shape) <= MOST_WEIGHTS
    assert copies == MOST_COPIES or (copies + 1) * math.prod(shape) > MOST_WEIGHTS


@pytest.mark.parametrize(
    ("containers", "bits", "container"),
    [(CONTAINERS, 1, 2), (CONTAINERS, 2, 2), (CONTAINERS, 3, 4), (CONTAINERS, 5, 8), (PORTABLE, 2, 4), (PORTABLE, 8, 8)],
)
def test_bits_that_share_a_container_are_one_model(containers, bits, container):
    model = LayerModel.at(FORMS["conv"], LayerBits(bits, 8), containers)
    assert model == LayerModel(form=FORMS["conv"], container=container, clipped=False)
    assert LayerModel.at(FORMS["conv"], LayerBits(bits, 7), containers).clipped


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_model_holds_its_layer_as_exported_files_do(form, container):
    onnx = pytest.importorskip("onnx")
    from bitscape.exporters.parity import read_layers

    model = onnx.load_from_string(LayerModel(form=form, container=container, clipped=False).content())
    onnx.checker.check_model(model, full_check=True)
    layers = read_layers(model)
    assert [(layer.operator, layer.weight.shape) for layer in layers] == [(form.operator, form.weight_shape)] * form.copies
    low, high = min(layer.weight.min() for layer in layers), max(layer.weight.max() for layer in layers)
    assert -(2 ** (container - 1)) <= low < high <= 2 ** (container - 1) - 1
    assert len({layer.weight.tobytes() for layer in layers}) == form.copies  # or runtimes would compute one for all
    stored = [t for t in model.graph.initializer if math.prod(t.dims) == math.prod(form.weight_shape) and len(t.raw_data) > 0]
    packed = math.ceil(math.prod(form.weight_shape) * container / 8)
    assert sum(len(tensor.raw_data) == packed for tensor in stored) == form.copies


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("clipped", [False, True])
def test_no_runtime_computes_a_layer_in_float(runtime, form, clipped):
    pytest.importorskip("onnx")
    runtime_or_skip(runtime)
    opened = RUNTIMES[runtime]().open
    codes = np.random.default_rng(0).integers(0, 256, form.input_shape, dtype=np.uint8)
    for container in CONTAINERS if runtime == "onnxruntime" else PORTABLE:
        session = opened(LayerModel(form=form, container=container, clipped=clipped).content())
        assert session.float_layers() == []
        (values,) = session.run(codes)
        assert (values.dtype, values.size) == (np.uint8, form.copies)
        assert not clipped or values.max() <= 15


def test_the_model_without_layers_takes_the_same_input():
    onnx = pytest.importorskip("onnx")
    runtime_or_skip("onnxruntime")
    content = without_layers(FORMS["conv"])
    assert {node.op_type for node in onnx.load_from_string(content).graph.node} == {"Slice", "Concat"}
    codes = np.full(FORMS["conv"].input_shape, 7, np.uint8)
    assert RUNTIMES["onnxruntime"]().open(content).run(codes)[0].tolist() == [[[[7]]]]
