"""What torch's operators become in a TFLite file.

Images are stored as LiteRT's kernels want them, channels last. A tensor keeps the order in which its dimensions are stored, so that a
permutation moves nothing; TRANSPOSE stands where an operator wants another order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.graph import (
    BYTE,
    LINEAR,
    WORD,
    ActivationGrid,
    aten,
    grid_of,
    is_quantizer,
)
from bitscape.exporters.integer.weights import IntegerWeight
from bitscape.exporters.tflite.fit import quantizer_behind, unit_grid
from bitscape.exporters.tflite.flatbuffer import Builder, Quantization

Array = NDArray[Any]
Storage = Literal["int8", "int4"]
CHANNELS_LAST = (0, 2, 3, 1)
NONE, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3
"""Rectifiers that operators compute along with their own work."""
LIMITS = {RELU: (0.0, math.inf), RELU_N1_TO_1: (-1.0, 1.0), RELU6: (0.0, 6.0)}
"""Smallest and largest value that each lets through."""
SAME, VALID = 0, 1
NARROW_BITS = 4
"""Of the narrower weights that files store."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of the file that holds what a node computes."""

    index: int
    shape: tuple[int, ...]
    """As in torch."""
    order: tuple[int, ...]
    """Of torch's dimensions, as the file stores them."""
    grid: ActivationGrid

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.shape[axis] for axis in self.order)


def offset(grid: ActivationGrid) -> int:
    """What is taken from the unsigned codes of a grid to make the signed ones of the file."""
    return ((WORD if grid.is_wide else BYTE) + 1) // 2


def kind_of(grid: ActivationGrid) -> str:
    """The file's type of activations on a grid."""
    return "INT16" if grid.is_wide else "INT8"


class Writer:
    """Writes the operators of an integer network, one image at a time."""

    def __init__(
        self, network: IntegerNetwork, shapes: dict[fx.Node, tuple[int, ...]], weights: Storage
    ) -> None:
        self.network = network
        self.weights = weights
        self.builder = Builder()
        self._shapes = shapes
        self._values: dict[fx.Node, Value] = {}
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def content(self) -> bytes:
        """The file. Raises BitscapeError for an operator that has no counterpart."""
        names = iter(self.network.interface.names)
        for node in self.network.module.graph.nodes:
            if node.op == "placeholder":
                self._input(node, next(names))
            elif node.op == "output":
                self._output(node)
            elif (
                node.op == "call_function"
                and node not in self._values
                and node.target is not aten.sym_size.int
            ):
                self._call(node)
        return self.builder.content(self._inputs, self._outputs)

    def _call(self, node: fx.Node) -> None:
        if is_quantizer(node):
            self._quantize(node)
        elif (write := OPERATORS.get(node.target)) is not None:
            write(self, node)
        elif getattr(node.target, "__name__", "") == "getitem":
            _part(self, node)
        else:
            raise unwritten(node, "the file has no integer operator for it")

    # Tensors

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of what a node computes of one sample."""
        return self._shapes[node]

    def value(self, node: object, user: fx.Node) -> Value:
        """What a node computes. Raises BitscapeError where that is not in the file, or was never quantized."""
        if isinstance(node, fx.Node) and node in self._values:
            return self._values[node]
        raise unwritten(
            user, "it takes what is no activation, such as a constant that it is not written with"
        )

    def tensor(
        self, name: str, shape: Sequence[int], order: Sequence[int], grid: ActivationGrid
    ) -> Value:
        """A new tensor."""
        quantization = Quantization(
            scale=np.array([grid.scale]), zero_point=round(grid.zero_point) - offset(grid)
        )
        value = Value(index=-1, shape=tuple(shape), order=tuple(order), grid=grid)
        return replace(
            value, index=self.builder.tensor(name, value.stored, kind_of(grid), quantization)
        )

    def constant(self, name: str, values: Array, grid: ActivationGrid) -> Value:
        """Values that an operator takes beside what is computed of images; in the order of torch's dimensions."""
        codes = grid.quantize(torch.from_numpy(np.asarray(values, np.float32))).numpy() - offset(
            grid
        )
        quantization = Quantization(
            scale=np.array([grid.scale]), zero_point=round(grid.zero_point) - offset(grid)
        )
        index = self.builder.constant(
            name, codes.astype(np.int16 if grid.is_wide else np.int8), quantization
        )
        return Value(index=index, shape=codes.shape, order=tuple(range(codes.ndim)), grid=grid)

    def numbers(self, name: str, values: Sequence[int]) -> int:
        """Whole numbers that tell an operator what to do."""
        return self.builder.constant(name, np.array(values, np.int32))

    def arranged(self, value: Value, order: Sequence[int]) -> Value:
        """The value stored in another order."""
        order = tuple(order)
        if value.order == order:
            return value
        moved = self.tensor(f"tensor_{len(self.builder.tensors)}", value.shape, order, value.grid)
        if _without_ones(value.order, value.shape) == _without_ones(order, value.shape):
            self._reshape(value, moved)
        else:
            places = [value.order.index(axis) for axis in order]
            self.builder.operator(
                "TRANSPOSE",
                [value.index, self.numbers("order", places)],
                [moved.index],
                "Transpose",
            )
        return moved

    def _reshape(self, value: Value, to: Value) -> None:
        shape = self.numbers("shape", to.stored)
        self.builder.operator(
            "RESHAPE", [value.index, shape], [to.index], "Reshape", newShape=list(to.stored)
        )

    def set(self, node: fx.Node, value: Value) -> None:
        """Say where the file holds what `node` computes, in the shape that torch gives it."""
        self._values[node] = value

    def result(
        self,
        node: fx.Node,
        code: str,
        inputs: Sequence[int],
        order: Sequence[int],
        options: str | None,
        *,
        rectifies: bool = False,
        **settings: Any,
    ) -> None:
        """Write an operator whose results pass the quantizer behind `node`, and what cuts them off there."""
        quantizer = quantizer_behind(node)
        if quantizer is None:
            raise unwritten(node, "its results are not quantized")
        grid, shape = grid_of(quantizer), self.shape(node)
        fused = _fused(grid) if rectifies else (NONE if _is_loose(grid) else None)
        made = self.tensor(node.name, shape, order, grid)
        if rectifies:
            settings["fusedActivationFunction"] = NONE if fused is None else fused
        self.builder.operator(code, inputs, [made.index], options, **settings)
        self.set(quantizer, made if fused is not None else self._limited(made))
        self.set(node, self._values[quantizer])

    def _limited(self, value: Value) -> Value:
        """The value, its codes cut off at the limits of its grid."""
        grid = value.grid
        top = WORD if grid.is_wide else BYTE
        for code, limit, applies in (
            ("MAXIMUM", grid.qmin, grid.qmin > 0),
            ("MINIMUM", grid.qmax, grid.qmax < top),
        ):
            if applies:
                number = np.array(grid.scale * (limit - grid.zero_point)).reshape(
                    [1] * len(value.shape)
                )
                other = self.constant(
                    f"limit_{len(self.builder.tensors)}", number, replace(grid, qmin=0, qmax=top)
                )
                cut = self.tensor(
                    f"limited_{len(self.builder.tensors)}", value.shape, value.order, grid
                )
                self.builder.operator(
                    code, [value.index, other.index], [cut.index], "MaximumMinimum"
                )
                value = cut
        return value

    def step(
        self,
        node: fx.Node,
        code: str,
        inputs: Sequence[int],
        like: Value,
        grid: ActivationGrid,
        options: str | None,
        **settings: Any,
    ) -> Value:
        """Write an operator that is one of several that a node becomes."""
        made = self.tensor(f"{node.name}_{len(self.builder.tensors)}", like.shape, like.order, grid)
        self.builder.operator(code, inputs, [made.index], options, **settings)
        return made

    # Ends of the graph, and quantizers

    def _input(self, node: fx.Node, name: str) -> None:
        quantizer = quantizer_behind(node)
        if quantizer is None:
            raise BitscapeError(
                f"network: its input {name} is not quantized, and TFLite files hold integers alone; export to ONNX"
            )
        shape, grid = self.shape(node), grid_of(quantizer)
        made = self.tensor(
            name, shape, CHANNELS_LAST if len(shape) == 4 else range(len(shape)), grid
        )
        self._inputs.append(made.index)
        self.set(quantizer, made if _is_loose(grid) else self._limited(made))

    def _output(self, node: fx.Node) -> None:
        ends = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        for name, end in zip(self.network.interface.outputs, ends, strict=True):
            if not isinstance(end, fx.Node) or end not in self._values:
                raise BitscapeError(
                    f"network: its output {name} is not computed of the input in integers; export to ONNX"
                )
            value = self._values[end]
            value = self.arranged(
                value, CHANNELS_LAST if len(value.shape) == 4 else range(len(value.shape))
            )
            if value.index in (*self._inputs, *self._outputs):
                copied = self.tensor(name, value.shape, value.order, value.grid)
                self._reshape(value, copied)
                value = copied
            self.builder.tensors[value.index].name = name
            self._outputs.append(value.index)

    def _quantize(self, node: fx.Node) -> None:
        source, grid = node.all_input_nodes[0], grid_of(node)
        if source.op == "get_attr":
            values: Tensor = attrgetter(str(source.target))(self.network.module)
            self.set(node, self.constant(str(source.target), values.detach().cpu().numpy(), grid))
            return
        value = self.value(source, node)
        if (value.grid.scale, value.grid.zero_point, value.grid.is_wide) != (
            grid.scale,
            grid.zero_point,
            grid.is_wide,
        ):
            value = self.step(node, "QUANTIZE", [value.index], value, grid, "Quantize")
            self.set(node, value if _is_loose(grid) else self._limited(value))
        elif grid.qmin <= value.grid.qmin and value.grid.qmax <= grid.qmax:
            self.set(node, value)
        else:
            self.set(node, self._limited(replace(value, grid=grid)))

    # Layers

    def layer(self, node: fx.Node) -> tuple[Value, str, IntegerWeight]:
        """What a layer takes, the name of its weight, and that. Raises BitscapeError for a layer in float."""
        key = str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""
        if key not in self.network.weights:
            raise unwritten(node, "its weights are not quantized")
        return self.value(node.args[0], node), key, self.network.weights[key]

    def weight(self, key: str, codes: Tensor, axis: int) -> int:
        """The tensor of a layer's codes, arranged as the operator wants them; scales lie along `axis`."""
        weight = self.network.weights[key]
        quantization = Quantization(scale=weight.output_scale.cpu().numpy(), axis=axis)
        kind = "INT4" if self.weights == "int4" and weight.bits <= NARROW_BITS else "INT8"
        return self.builder.constant(
            key, codes.cpu().numpy().astype(np.int8), quantization, kind=kind
        )

    def bias(self, key: str, x: Value) -> int:
        """The tensor of a layer's bias; zeros where it has none."""
        weight = self.network.weights[key]
        integers = (
            self.network.biases[key].cpu().numpy()
            if key in self.network.biases
            else np.zeros(len(weight.rows), np.int64)
        )
        scale = weight.output_scale.cpu().numpy() * np.float32(x.grid.scale)
        name = f"{key.removesuffix('weight')}bias"
        return self.builder.constant(
            name,
            integers.astype(np.int64 if x.grid.is_wide else np.int32),
            Quantization(scale=scale),
        )

    def padded(self, x: Value, pads: Sequence[tuple[int, int]], *, lowest: bool = False) -> Value:
        """Channels-last images with rows and columns around them, of zeros or of the lowest code."""
        (top, bottom), (left, right) = pads
        n, c, h, w = x.shape
        made = self.tensor(
            f"padded_{len(self.builder.tensors)}",
            (n, c, h + top + bottom, w + left + right),
            x.order,
            x.grid,
        )
        amounts = self.builder.constant(
            "pads", np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        )
        if lowest and x.grid.zero_point:
            low = self.constant("lowest", np.array([-x.grid.scale * x.grid.zero_point]), x.grid)
            self.builder.operator("PADV2", [x.index, amounts, low.index], [made.index], "PadV2")
        else:
            self.builder.operator("PAD", [x.index, amounts], [made.index], "Pad")
        return made

    def windowed(
        self, node: fx.Node, x: Value, window: "Windows", *, lowest: bool = False
    ) -> tuple[Value, int]:
        """What a convolution or pooling takes, padded where the file's two kinds of padding cannot say it; and the kind."""
        pads = window.pads(x.shape[2:], self.shape(node)[2:])
        if pads == window.same(x.shape[2:]):
            return x, SAME
        return (
            (x, VALID) if not any(map(any, pads)) else (self.padded(x, pads, lowest=lowest), VALID)
        )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Where a convolution or pooling looks, rows first."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> "Windows":
        """From torch's arguments, which may be one number for both."""
        return cls(
            kernel=_pair(kernel),
            stride=_pair(stride or kernel),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(dilation),
        )

    def _reach(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    def same(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Padding of TensorFlow's kind "same"."""
        outputs = [-(-size // stride) for size, stride in zip(sizes, self.stride, strict=True)]
        return [
            _halves(max(0, self._needed(axis, size, outputs[axis])))
            for axis, size in enumerate(sizes)
        ]

    def _needed(self, axis: int, size: int, outputs: int) -> int:
        return (outputs - 1) * self.stride[axis] + self._reach(axis) - size

    def pads(self, sizes: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
        """Padding in front and behind with which `sizes` become `outputs`, and which no window leaves out."""
        if self.padding == "same":
            return [_halves(self._reach(axis) - 1) for axis in range(2)]
        before = (0, 0) if isinstance(self.padding, str) else self.padding
        behind = [
            max(0, self._needed(axis, size, outputs[axis]) - before[axis])
            for axis, size in enumerate(sizes)
        ]
        return list(zip(before, behind, strict=True))


def _halves(total: int) -> tuple[int, int]:
    return total // 2, total - total // 2


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _without_ones(order: Sequence[int], shape: Sequence[int]) -> list[int]:
    return [axis for axis in order if shape[axis] != 1]


def _is_loose(grid: ActivationGrid) -> bool:
    """Whether nothing but the type limits the codes."""
    return grid.qmin <= 0 and grid.qmax >= (WORD if grid.is_wide else BYTE)


def _fused(grid: ActivationGrid) -> int | None:
    """The rectifier whose limits are those of the grid; None without one."""
    if _is_loose(grid):
        return NONE
    found = (name for name in LIMITS if fused_limits(name, grid) == (grid.qmin, grid.qmax))
    return next(found, None)


def fused_limits(rectifier: int, grid: ActivationGrid) -> tuple[int, int]:
    """The codes that a rectifier cuts off at, as LiteRT computes them: a quotient in float32, rounded half away from zero."""
    top = WORD if grid.is_wide else BYTE
    low, high = LIMITS[rectifier]

    def code(value: float) -> int:
        quotient = float(np.float32(value) / np.float32(grid.scale))
        return round(grid.zero_point) + math.floor(abs(quotient) + 0.5) * (
            -1 if quotient < 0 else 1
        )

    return max(0, code(low)), top if math.isinf(high) else min(top, code(high))


def unwritten(node: fx.Node, reason: str) -> BitscapeError:
    """The error for a node that cannot be written."""
    operator = str(node.target).removeprefix("aten.").partition(".")[0]
    modules = node.meta.get("nn_module_stack")
    place = next(reversed(modules.values()))[0] if modules else ""
    where = f"{operator} in {place}" if place else operator
    return BitscapeError(
        f"network: {where} cannot be written to a TFLite file ({reason}); export to ONNX or OpenVINO"
    )


# Operators


def _given(node: fx.Node, *defaults: Any) -> list[Any]:
    """The positional arguments behind the first, those left out at their defaults."""
    return [*node.args[1:], *defaults[len(node.args) - 1 :]]


def _convolution(writer: Writer, node: fx.Node) -> None:
    x, key, weight = writer.layer(node)
    _, _, stride, padding, dilation, groups = _given(node, None, None, 1, 0, 1, 1)
    x = writer.arranged(x, CHANNELS_LAST)
    outputs, inputs, *kernel = weight.rows.shape
    window = Windows.of(kernel, stride, padding, dilation)
    depthwise = groups == x.shape[1] and inputs == 1
    codes = weight.rows.permute(1, 2, 3, 0) if depthwise else weight.rows.permute(0, 2, 3, 1)
    taken, kind = writer.windowed(node, x, window)
    settings = {
        "padding": kind,
        "strideH": window.stride[0],
        "strideW": window.stride[1],
        "dilationHFactor": window.dilation[0],
        "dilationWFactor": window.dilation[1],
    }
    given = [taken.index, writer.weight(key, codes, 3 if depthwise else 0), writer.bias(key, x)]
    if depthwise:
        settings["depthMultiplier"] = outputs // groups
    code, options = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if depthwise else ("CONV_2D", "Conv2D")
    writer.result(node, code, given, CHANNELS_LAST, options, rectifies=True, **settings)


def _transposed(writer: Writer, node: fx.Node) -> None:
    x, key, weight = writer.layer(node)
    _, _, stride, padding, more, groups, dilation = _given(node, None, None, 1, 0, 0, 1, 1)
    x = writer.arranged(x, CHANNELS_LAST)
    shape, (strides, before, behind) = writer.shape(node), map(_pair, (stride, padding, more))
    if groups != 1 or _pair(dilation) != (1, 1):
        raise unwritten(node, "transposed convolutions have no groups and no dilation there")
    kernel = weight.rows.shape[2:]
    if not any((*before, *behind)):
        kind = VALID
    else:
        totals = [
            max(0, (x.shape[2 + axis] - 1) * strides[axis] + kernel[axis] - shape[2 + axis])
            for axis in range(2)
        ]
        if any(
            shape[2 + axis] != x.shape[2 + axis] * strides[axis]
            or totals[axis] // 2 != before[axis]
            for axis in range(2)
        ):
            raise unwritten(node, "its padding is neither none nor TensorFlow's")
        kind = SAME
    size = writer.numbers("size", [shape[axis] for axis in CHANNELS_LAST])
    given = [
        size,
        writer.weight(key, weight.rows.permute(0, 2, 3, 1), 0),
        x.index,
        writer.bias(key, x),
    ]
    settings = {"padding": kind, "strideH": strides[0], "strideW": strides[1]}
    writer.result(
        node, "TRANSPOSE_CONV", given, CHANNELS_LAST, "TransposeConv", rectifies=True, **settings
    )


def _linear(writer: Writer, node: fx.Node) -> None:
    x, key, weight = writer.layer(node)
    order = tuple(range(len(x.shape)))
    x = writer.arranged(x, x.order if x.order[-1] == order[-1] else order)
    given = [x.index, writer.weight(key, weight.rows, 0), writer.bias(key, x)]
    writer.result(
        node,
        "FULLY_CONNECTED",
        given,
        x.order,
        "FullyConnected",
        rectifies=True,
        keepNumDims=len(order) > 2,
    )


def _elementwise(code: str, options: str) -> "Write":
    def write(writer: Writer, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            raise unwritten(node, "it multiplies its second operand")
        first, second = _operands(writer, node)
        writer.result(node, code, [first.index, second.index], first.order, options, rectifies=True)

    return write


def _operands(writer: Writer, node: fx.Node) -> tuple[Value, Value]:
    """Both operands, of the same number of dimensions in the same order."""
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    values = {arg: writer.value(arg, node) for arg in nodes}
    rank = len(writer.shape(node))
    order = next(value.order for value in values.values() if len(value.order) == rank)
    wide = next(iter(values.values())).grid.is_wide
    given: list[Any] = list(node.args)
    first, second = (
        values[arg] if isinstance(arg, fx.Node) else _number(writer, node, arg, wide)
        for arg in given
    )
    return _stretched(writer, first, order), _stretched(writer, second, order)


def _stretched(writer: Writer, value: Value, order: tuple[int, ...]) -> Value:
    """The value in an order of perhaps more dimensions, as NumPy broadcasts."""
    missing = len(order) - len(value.shape)
    if missing:
        shape = (*[1] * missing, *value.shape)
        value = _reshaped(writer, value, shape)
    return writer.arranged(value, order)


def _number(writer: Writer, node: fx.Node, number: float, wide: bool) -> Value:
    """A constant of one value, which its largest code stands for exactly."""
    middle = ((WORD if wide else BYTE) + 1) // 2
    grid = ActivationGrid(
        scale=abs(number) / (middle - 1) or 1.0,
        zero_point=float(middle),
        qmin=0,
        qmax=2 * middle - 1,
    )
    return writer.constant(f"{node.name}_number", np.array([number]), grid)


def _average(writer: Writer, node: fx.Node) -> None:
    x = writer.arranged(writer.value(node.args[0], node), CHANNELS_LAST)
    kernel, stride, padding, ceil, counts_padding, divisor = _given(
        node, 1, None, 0, False, True, None
    )
    window = Windows.of(kernel, stride, padding, 1)
    pads = window.pads(x.shape[2:], writer.shape(node)[2:])
    counted = any(map(any, pads)) and counts_padding and any(_pair(padding))
    if divisor or (counted and ceil):
        raise unwritten(node, "it divides by other numbers than its windows have values")
    if counted:
        x, kind = writer.padded(x, pads), VALID
    elif pads == window.same(x.shape[2:]):
        kind = SAME
    elif any(map(any, pads)):
        raise unwritten(node, "its padding is neither counted nor TensorFlow's")
    else:
        kind = VALID
    _pool(writer, node, "AVERAGE_POOL_2D", x, window, kind)


def _pool(writer: Writer, node: fx.Node, code: str, x: Value, window: Windows, kind: int) -> None:
    (rows, columns), (down, right) = window.kernel, window.stride
    settings = {
        "padding": kind,
        "strideH": down,
        "strideW": right,
        "filterHeight": rows,
        "filterWidth": columns,
    }
    writer.result(node, code, [x.index], CHANNELS_LAST, "Pool2D", rectifies=True, **settings)


def _adaptive(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    sizes, outputs = x.shape[2:], writer.shape(node)[2:]
    if outputs == (1, 1):
        _mean_of(writer, node, x, [2, 3], keep=True)
        return
    if any(size % output for size, output in zip(sizes, outputs, strict=True)):
        raise unwritten(node, "its windows differ in size")
    kernel = [size // output for size, output in zip(sizes, outputs, strict=True)]
    _pool(
        writer,
        node,
        "AVERAGE_POOL_2D",
        writer.arranged(x, CHANNELS_LAST),
        Windows.of(kernel, None, 0, 1),
        VALID,
    )


def _mean(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    axes, keep = _given(node, None, False)[:2]
    _mean_of(writer, node, x, range(len(x.shape)) if axes is None else axes, keep=keep)


def _mean_of(writer: Writer, node: fx.Node, x: Value, axes: Sequence[int], *, keep: bool) -> None:
    gone = {axis % len(x.shape) for axis in axes}
    places = sorted(x.order.index(axis) for axis in gone)
    left = [axis for axis in range(len(x.shape)) if axis not in gone]
    order = x.order if keep else tuple(left.index(axis) for axis in x.order if axis in left)
    writer.result(
        node,
        "MEAN",
        [x.index, writer.numbers("axes", places)],
        order,
        "Reducer",
        keepDims=bool(keep),
    )


def _maximum(writer: Writer, node: fx.Node) -> None:
    x = writer.arranged(writer.value(node.args[0], node), CHANNELS_LAST)
    kernel, stride, padding, dilation, _ = _given(node, 1, None, 0, 1, False)
    if _pair(dilation) != (1, 1):
        raise unwritten(node, "its window has gaps")
    window = Windows.of(kernel, stride, padding, 1)
    taken, kind = writer.windowed(node, x, window, lowest=True)
    (rows, columns), (down, right) = window.kernel, window.stride
    settings = {
        "padding": kind,
        "strideH": down,
        "strideW": right,
        "filterHeight": rows,
        "filterWidth": columns,
    }
    _move(writer, node, "MAX_POOL_2D", [taken.index], x, "Pool2D", **settings)


def _move(
    writer: Writer,
    node: fx.Node,
    code: str,
    inputs: Sequence[int],
    x: Value,
    options: str,
    **settings: Any,
) -> None:
    """Write an operator whose results are codes of what it takes."""
    made = writer.tensor(node.name, writer.shape(node), x.order, x.grid)
    writer.builder.operator(code, inputs, [made.index], options, **settings)
    writer.set(node, made)


def _concatenation(writer: Writer, node: fx.Node) -> None:
    parts: list[fx.Node] = node.args[0]  # type: ignore[assignment]
    order = writer.value(parts[0], node).order
    values = [writer.arranged(writer.value(part, node), order) for part in parts]
    axis = _given(node, 0)[0] % len(order)
    writer.result(
        node,
        "CONCATENATION",
        [value.index for value in values],
        order,
        "Concatenation",
        axis=order.index(axis),
    )


def _pad(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    is_constant = node.target is aten.constant_pad_nd.default
    amounts, *rest = _given(node, [], 0) if is_constant else _given(node, [], "constant", None)
    mode, number = ("constant", *rest) if is_constant else rest
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    by_axis = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs
    if number or mode not in ("constant", "reflect") or min(map(min, by_axis)) < 0:
        raise unwritten(node, f"it pads otherwise than with zeros or a mirror image ({mode})")
    amount = writer.builder.constant(
        "pads", np.array([by_axis[axis] for axis in x.order], np.int32)
    )
    code, options = ("PAD", "Pad") if mode == "constant" else ("MIRROR_PAD", "MirrorPad")
    _move(writer, node, code, [x.index, amount], x, options)


def _nearest(writer: Writer, node: fx.Node) -> None:
    x = writer.arranged(writer.value(node.args[0], node), CHANNELS_LAST)
    size = writer.numbers("size", writer.shape(node)[2:])
    _move(writer, node, "RESIZE_NEAREST_NEIGHBOR", [x.index, size], x, "ResizeNearestNeighbor")


def _bilinear(writer: Writer, node: fx.Node) -> None:
    x = writer.arranged(writer.value(node.args[0], node), CHANNELS_LAST)
    size, aligned = writer.numbers("size", writer.shape(node)[2:]), bool(node.args[2])
    settings = {"alignCorners": aligned, "halfPixelCenters": not aligned}
    writer.result(
        node, "RESIZE_BILINEAR", [x.index, size], CHANNELS_LAST, "ResizeBilinear", **settings
    )


def _softmax(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    rank = len(x.shape)
    axis = _given(node, -1)[0] % rank
    x = writer.arranged(
        x,
        x.order if x.order[-1] == axis else (*(other for other in x.order if other != axis), axis),
    )
    writer.result(node, "SOFTMAX", [x.index], x.order, "Softmax", beta=1.0)


def _unary(code: str, options: str | None) -> "Write":
    def write(writer: Writer, node: fx.Node) -> None:
        x = writer.value(node.args[0], node)
        writer.result(node, code, [x.index], x.order, options)

    return write


def _leaky(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    writer.result(
        node, "LEAKY_RELU", [x.index], x.order, "LeakyRelu", alpha=float(_given(node, 0.01)[0])
    )


def _gelu(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    writer.result(
        node,
        "GELU",
        [x.index],
        x.order,
        "Gelu",
        approximate=node.kwargs.get("approximate") == "tanh",
    )


def _silu(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    gate = writer.step(node, "LOGISTIC", [x.index], x, unit_grid(wide=x.grid.is_wide), None)
    writer.result(node, "MUL", [x.index, gate.index], x.order, "Mul", rectifies=True)


def _hardsigmoid(writer: Writer, node: fx.Node) -> None:
    """min(max(x + 3, 0), 6) and a sixth of it."""
    x = writer.value(node.args[0], node)
    wide = x.grid.is_wide
    top = ((WORD + 1) // 2 - 1) if wide else BYTE
    zero = (WORD + 1) // 2 if wide else 0
    six = ActivationGrid(scale=6 / top, zero_point=float(zero), qmin=zero, qmax=zero + top)
    three, sixth = (
        _stretched(writer, _number(writer, node, number, wide), x.order) for number in (3.0, 1 / 6)
    )
    shifted = writer.step(
        node, "ADD", [x.index, three.index], x, six, "Add", fusedActivationFunction=RELU6
    )
    writer.result(node, "MUL", [shifted.index, sixth.index], x.order, "Mul", rectifies=True)


def _reshape(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.all_input_nodes[0], node)
    writer.set(node, _reshaped(writer, x, writer.shape(node)))


def _reshaped(writer: Writer, x: Value, shape: Sequence[int]) -> Value:
    shape, order = tuple(shape), tuple(range(len(x.shape)))
    if shape == x.shape:
        return x
    if _without_ones(x.order, x.shape) != _without_ones(order, x.shape):
        x = writer.arranged(x, order)
    made = writer.tensor(
        f"reshaped_{len(writer.builder.tensors)}", shape, range(len(shape)), x.grid
    )
    writer._reshape(x, made)
    return made


def _permute(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    rank, given = len(x.shape), _given(node)
    axes = list(range(rank))
    if node.target is aten.transpose.int:
        first, second = (axis % rank for axis in given)
        axes[first], axes[second] = second, first
    else:
        axes = [axis % rank for axis in given[0]]
    order = tuple(axes.index(axis) for axis in x.order)
    writer.set(node, replace(x, shape=writer.shape(node), order=order))


def _same(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    if writer.shape(node) != x.shape:
        raise unwritten(node, "it repeats values")
    writer.set(node, x)


def _slice(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    axis, start, end, step = _given(node, 0, None, None, 1)
    axis %= len(x.shape)
    start, end, step = slice(start, end, step).indices(x.shape[axis])
    writer.set(node, _cut(writer, node, x, axis, start, end, step))


def _cut(
    writer: Writer, node: fx.Node, x: Value, axis: int, start: int, end: int, step: int = 1
) -> Value:
    if (start, end, step) == (0, x.shape[axis], 1):
        return x
    begins, ends, steps = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
    begins[axis], ends[axis], steps[axis] = start, end, step
    shape = list(x.shape)
    shape[axis] = len(range(start, end, step))
    made = writer.tensor(f"{node.name}_part", shape, x.order, x.grid)
    numbers = [
        writer.numbers("slice", [values[place] for place in x.order])
        for values in (begins, ends, steps)
    ]
    writer.builder.operator("STRIDED_SLICE", [x.index, *numbers], [made.index], "StridedSlice")
    return made


def _select(writer: Writer, node: fx.Node) -> None:
    x = writer.value(node.args[0], node)
    axis, at = _given(node)
    axis %= len(x.shape)
    at %= x.shape[axis]
    writer.set(node, _reshaped(writer, _cut(writer, node, x, axis, at, at + 1), writer.shape(node)))


def _parts(writer: Writer, node: fx.Node) -> None:
    """Each part is cut out where it is taken."""


def _part(writer: Writer, node: fx.Node) -> None:
    source, at = node.args
    assert isinstance(source, fx.Node) and isinstance(at, int)
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        raise unwritten(source, "the file has no integer operator for it")
    x = writer.value(source.args[0], source)
    if source.target is aten.unbind.int:
        axis = _given(source, 0)[0] % len(x.shape)
        writer.set(
            node, _reshaped(writer, _cut(writer, node, x, axis, at, at + 1), writer.shape(node))
        )
        return
    sizes, axis = _given(source, 1, 0)
    axis %= len(x.shape)
    begins = [sum(sizes[:at])] if isinstance(sizes, list | tuple) else [at * sizes]
    writer.set(node, _cut(writer, node, x, axis, begins[0], begins[0] + writer.shape(node)[axis]))


Write = Callable[[Writer, fx.Node], None]
OPERATORS: dict[object, Write] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv_transpose2d.input: _transposed,
    LINEAR: _linear,
    aten.add.Tensor: _elementwise("ADD", "Add"),
    aten.sub.Tensor: _elementwise("SUB", "Sub"),
    aten.mul.Tensor: _elementwise("MUL", "Mul"),
    aten.avg_pool2d.default: _average,
    aten.adaptive_avg_pool2d.default: _adaptive,
    aten.mean.dim: _mean,
    aten.max_pool2d.default: _maximum,
    aten.cat.default: _concatenation,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_bilinear2d.vec: _bilinear,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.sigmoid.default: _unary("LOGISTIC", None),
    aten.tanh.default: _unary("TANH", None),
    aten.hardswish.default: _unary("HARD_SWISH", "HardSwish"),
    aten.hardsigmoid.default: _hardsigmoid,
    aten.leaky_relu.default: _leaky,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.clone.default: _same,
    aten.expand.default: _same,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.unbind.int: _parts,
}
"""torch's operator -> what writes it."""
