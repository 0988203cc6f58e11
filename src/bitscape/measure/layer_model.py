"""One layer alone as an ONNX model of random integers: what is timed where a layer of a network shall be.

Copies with weights of their own stand side by side, in the form in which `exporters.onnx.qdq` writes layers; of each output one value
is kept:

    uint8 codes -> DequantizeLinear -+-> layer -> QuantizeLinear (-> Clip) -> Slice -+-> Concat
                                     +-> ...                                         |

A network has the Clip of activations below 8 bits in front of the layer, behind the quantizer of the layer before. It stands behind the
layer here because there runtimes can fuse it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bitscape.errors import needs_extra
from bitscape.exporters.onnx.qdq import OPSETS
from bitscape.models.layers import PLAIN, TRANSPOSED, WeightLayout, weight_layout
from bitscape.policy import MAX_BITS, LayerBits

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
MOST_COPIES = 8
"""Enough that what a call costs by itself counts for little."""
MOST_WEIGHTS = 1 << 24
"""Of all copies together, unless one has more: 16 MB."""
X_SCALE, W_SCALE, Y_SCALE = np.float32(0.02), np.float32(0.01), np.float32(0.05)  # of no consequence for the time


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """What decides how long a call of a layer takes; layers of one form are measured once."""

    operator: str
    """Conv, ConvTranspose, Gemm, or MatMul for a linear layer on more than two dimensions."""
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    """With the batch."""
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    """As ONNX has them: all begins, then all ends."""
    dilations: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    """Of a transposed convolution."""
    layout: WeightLayout = PLAIN

    def __str__(self) -> str:
        text = f"{self.operator} {_sizes(self.weight_shape)} on {_sizes(self.input_shape)}"
        if not self.is_convolution:
            return text
        settings = f"strides {_sizes(self.strides)}, pads {_sizes(self.pads)}, dilations {_sizes(self.dilations)}"
        behind = f", output padding {_sizes(self.output_padding)}" if self.output_padding else ""
        return f"{text}, {settings}, groups {self.groups}{behind}"

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed or not."""
        return self.operator in ("Conv", "ConvTranspose")

    @property
    def output_channels(self) -> int:
        """Channels or features of the output."""
        return self.weight_shape[1] * self.groups if self.operator == "ConvTranspose" else self.weight_shape[0]

    @property
    def copies(self) -> int:
        """Copies of the layer in a model."""
        return max(1, min(MOST_COPIES, MOST_WEIGHTS // math.prod(self.weight_shape)))


def form_of(layer: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]) -> LayerForm:
    """The form of one call of a convolution or linear layer; the shapes are with the batch, or without one where the call was."""
    weight, inputs = tuple(layer.get_parameter("weight").shape), tuple(input_shape)
    if isinstance(layer, nn.Linear):
        inputs = inputs if len(inputs) > 1 else (1, *inputs)
        return LayerForm(operator="Gemm" if len(inputs) == 2 else "MatMul", weight_shape=weight, input_shape=inputs)
    assert isinstance(layer, _ConvNd)
    inputs, outputs = ((1, *shape) if len(shape) < len(weight) else tuple(shape) for shape in (inputs, tuple(output_shape)))
    places = [(axis, inputs[2 + axis], outputs[2 + axis]) for axis in range(len(weight) - 2)]
    transposed = isinstance(layer, TRANSPOSED)
    axes = [(int(p), int(p)) for p in layer.padding] if transposed else [_padding(layer, *place) for place in places]
    return LayerForm(
        operator="ConvTranspose" if transposed else "Conv",
        weight_shape=weight,
        input_shape=inputs,
        strides=tuple(layer.stride),
        pads=tuple(begin for begin, _ in axes) + tuple(end for _, end in axes),
        dilations=tuple(layer.dilation),
        groups=layer.groups,
        output_padding=tuple(_output_padding(layer, *place) for place in places) if transposed else (),
        layout=weight_layout(layer),
    )


def _output_padding(layer: _ConvNd, axis: int, size: int, outputs: int) -> int:
    """What a transposed convolution, asked for so many `outputs`, adds behind them."""
    kernel = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    return outputs - ((size - 1) * layer.stride[axis] + kernel - 2 * int(layer.padding[axis]))


def _padding(layer: _ConvNd, axis: int, size: int, outputs: int) -> tuple[int, int]:
    """Padding with which `size` values become `outputs`: the layer's own, or what its forward adds to it ("same", TensorFlow's)."""
    stride, kernel = layer.stride[axis], layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    needed = (outputs - 1) * stride + kernel - size
    own = 0 if isinstance(layer.padding, str) else int(layer.padding[axis])
    if needed <= 2 * own < needed + stride:
        return own, own
    return max(0, needed) // 2, max(0, needed) - max(0, needed) // 2


@dataclass(frozen=True, kw_only=True)
class LayerModel:
    """A layer as it is stored and computed at a pair of bits."""

    form: LayerForm
    container: int
    """Bits that a weight is stored in: 2, 4 or 8."""
    clipped: bool
    """Whether activations have fewer than 8 bits."""

    @classmethod
    def at(cls, form: LayerForm, bits: LayerBits, containers: Sequence[int]) -> "LayerModel":
        """The model at `bits`, weights in the smallest of `containers` that holds them."""
        container = min(width for width in containers if width >= bits.weight)
        return cls(form=form, container=container, clipped=bits.activation < MAX_BITS)

    def __str__(self) -> str:
        return f"{self.form}; int{self.container} weights{', clipped' if self.clipped else ''}"

    def content(self) -> bytes:
        """An ONNX file. Raises BitscapeError when the packages of the extra "onnx" are missing."""
        graph = _Graph(self.form)
        x = graph.dequantized("images", X_SCALE, np.uint8(0))
        return graph.content([graph.layer(x, self, copy) for copy in range(self.form.copies)], self.container)


def without_layers(form: LayerForm) -> bytes:
    """The same ONNX file without the copies of the layer: what a call costs by itself."""
    return _Graph(form).content(["images"], 8)


class _Graph:
    """An ONNX graph in the making."""

    def __init__(self, form: LayerForm) -> None:
        self.form = form
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.random = np.random.default_rng(0)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        with needs_extra("onnx"):
            import onnx
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        with needs_extra("onnx"):
            from onnx import numpy_helper
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def dequantized(self, codes: str, scale: Any, zero: Any = None, **axis: int) -> str:
        return self.node("DequantizeLinear", codes, self.constant(scale), *([] if zero is None else [self.constant(zero)]), **axis)

    def layer(self, x: str, model: LayerModel, copy: int) -> str:
        form, channels = self.form, self.form.output_channels
        weight = self._weight(model)
        spacing = np.full(channels, X_SCALE * W_SCALE, np.float32)
        codes = self.random.integers(-1000, 1000, channels, dtype=np.int32)
        bias = self.dequantized(self.constant(codes), spacing, axis=0)
        if form.is_convolution:
            settings = {"strides": form.strides, "pads": form.pads, "dilations": form.dilations, "group": form.groups}
            behind = {"output_padding": form.output_padding} if form.output_padding else {}
            y = self.node(form.operator, x, weight, bias, **settings, **behind)
        elif form.operator == "Gemm":
            y = self.node("Gemm", x, weight, bias, transB=1)
        else:
            y = self.node("Add", self.node("MatMul", x, weight), bias)
        y = self.node("QuantizeLinear", y, self.constant(Y_SCALE), self.constant(np.uint8(0)))
        return self.node("Clip", y, self.constant(np.uint8(0)), self.constant(np.uint8(15))) if model.clipped else y

    def _weight(self, model: LayerModel) -> str:
        import ml_dtypes

        form, bits = model.form, model.container
        axis = form.layout.scale_axis
        scales, product = form.weight_shape[axis], not form.is_convolution
        codes = self.random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), form.weight_shape, dtype=np.int8)
        codes = np.ascontiguousarray(codes.T) if form.operator == "MatMul" else codes
        kinds = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
        stored = self.constant(codes.astype(kinds[bits]))
        stored = stored if bits == 8 else self.node("Cast", stored, to=3)  # INT8
        # As in `exporters.onnx.qdq`: ONNX Runtime fuses products only with a zero point.
        zeros = np.zeros(scales, np.int8) if product else None
        return self.dequantized(stored, np.full(scales, W_SCALE), zeros, axis=int(form.operator == "MatMul") or axis)

    def content(self, outputs: Sequence[str], container: int) -> bytes:
        from onnx import TensorProto, helper

        opset, ir_version = OPSETS[container]
        rank = len(self.form.input_shape)
        first = [self.constant(np.full(rank, 0)), self.constant(np.full(rank, 1)), self.constant(np.arange(rank))]
        last = self.node("Concat", *(self.node("Slice", output, *first) for output in outputs), axis=0)
        graph = helper.make_graph(
            self.nodes,
            "layer",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, self.form.input_shape)],
            [helper.make_tensor_value_info(last, TensorProto.UINT8, [len(outputs), *[1] * (rank - 1)])],
            list(self.constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        return bytes(model.SerializeToString())


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
