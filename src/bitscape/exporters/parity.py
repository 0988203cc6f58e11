"""Does a runtime compute an exported file as integers say it must? Every layer against a reference in exact arithmetic.

The reference reads integers and scales from the file itself and works on the very codes that the runtime fed to the layer:

    sum  = sum over inputs of (x - x_zero_point) * w + bias                  whole numbers, exact
    y    = clip(round(float32(sum) * (x_scale * w_scale / y_scale)) + y_zero_point)       half to even, multiplier in float32

so an error cannot hide behind rounding that adds up over layers, as it can when whole networks are compared in float. Float outputs are
compared in units of the sums, up to float32's rounding. The bias behind a MatMul is an operator of its own: both are brought to float32,
and y is the rounding of what they add up to.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bitscape.errors import BitscapeError, needs_extra
from bitscape.exporters.onnx.qdq import LAYER_OPERATORS
from bitscape.models.layers import WeightLayout
from bitscape.runtimes.sessions import Feed, OnnxRuntime, Runtime

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
IMAGES_AT_ONCE = 8
UINT8 = np.dtype(np.uint8)
_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
ROUNDING = 2.0**-22
"""Of float32, relative; two operations at most."""
ALLOWED = {"onnxruntime": 0.0, "openvino": 1e-3, "litert": 5e-3}
"""Share of codes that may differ, by one."""
PARITY_IMAGES = 16
"""Images whose every code is compared: the reference computes exactly, and slowly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileLayer:
    """A convolution or product with integer weights, as a file describes it."""

    name: str
    """Of the layer."""
    operator: str
    """Conv, ConvTranspose, Gemm or MatMul."""
    settings: dict[str, Any]
    """Attributes of a convolution: strides, pads, dilations, group."""
    input: str
    """Tensor of the input's codes."""
    input_scale: np.float32
    input_zero_point: int
    input_kind: np.dtype[Any]
    """uint8 or uint16."""
    weight: Array
    """int8, output channels first."""
    weight_scale: Array
    """float32 (output channels,)."""
    bias: Array
    """int64 (output channels,)."""
    float_bias: bool
    """Whether an Add behind the layer, a MatMul, brings the bias."""
    output: str
    """Tensor of the output: codes, or floats where nothing quantizes it."""
    output_scale: np.float32 | None
    """None where the output is float."""
    becomes_output: bool
    """Whether an output of the network, or codes of 16 bits, are made of its results before any quantizer of 8 bits."""
    output_zero_point: int = 0
    output_kind: np.dtype[Any] = UINT8
    """Of its codes: uint8 or uint16."""
    low: int = 0
    """Smallest code of the output."""
    high: int = 255
    """Largest code of the output."""

    @property
    def may_be_float(self) -> bool:
        """Whether a runtime may compute it in float.

        ONNX Runtime has no integer transposed convolution, nor one whose results are floats, nor any kernel of 16-bit activations; OpenVINO
        no transposed convolution of groups.
        """
        wide = self.input_kind.itemsize > 1 or self.output_kind.itemsize > 1
        returned = self.operator == "Conv" and self.output_scale is None and self.becomes_output
        return self.operator == "ConvTranspose" or wide or returned

    def difference(self, codes: Array, output: Array, *, in_float: bool = False) -> Array:
        """How far the output that a runtime made of its input's codes is off, int64: in codes, or in units of the sums.

        What is computed `in_float` may be off by what float32 loses in a sum of so many products, and take either code beside an edge that
        lies as near.
        """
        products, bias, spacing = self._products(codes), self._by_channel(self.bias), self._by_channel(self.input_scale * self.weight_scale)
        if self.output_scale is not None and not in_float:
            return np.abs(output.astype(np.int64) - self._output_codes(products, bias, spacing))
        allowed = ROUNDING * (np.abs(products) + np.abs(bias))
        if in_float:
            allowed = allowed + ROUNDING * max(1.0, math.sqrt(self.weight[0].size) / 4) * self._products(codes, absolute=True)
        if self.output_scale is not None:
            ends = [self._output_codes(products + off, bias, spacing) for off in (-allowed, allowed)]
            low, high = np.minimum(*ends), np.maximum(*ends)  # scales may be negative
            return np.asarray(np.maximum(low - output, output - high).clip(min=0).astype(np.int64))
        off = np.abs(output / spacing.astype(np.float64) - (products + bias)) - allowed
        return np.asarray(np.rint(off.clip(min=0)).astype(np.int64))

    def _products(self, codes: Array, *, absolute: bool = False) -> Array:
        """The exact sums of products, or of their absolute values, int64: in float64 nothing below 2^53 is rounded."""
        x = torch.from_numpy(codes.astype(np.float64) - self.input_zero_point)
        weight = torch.from_numpy(self.weight.astype(np.float64))
        x, weight = (x.abs(), weight.abs()) if absolute else (x, weight)
        if not self.is_convolution:
            return np.asarray(np.rint((x @ weight.T).numpy()).astype(np.int64))
        spatial, pads = weight.ndim - 2, _torch_padding(self.settings["pads"])
        settings = {"stride": self.settings["strides"], "dilation": self.settings["dilations"], "groups": self.settings["group"]}
        if self.operator == "Conv":
            sums = _CONVOLUTIONS[spatial](F.pad(x, pads), weight, **settings)
        else:
            more = self.settings.get("output_padding", [0] * spatial)
            weight = WeightLayout(transposed_groups=settings["groups"]).outputs_first(weight)
            sums = F.pad(_TRANSPOSED[spatial](x, weight, output_padding=more, **settings), [-amount for amount in pads])
        return np.asarray(np.rint(sums.numpy()).astype(np.int64))

    @property
    def is_convolution(self) -> bool:
        """Whether channels are the second dimension of what it takes and makes."""
        return self.operator in ("Conv", "ConvTranspose")

    def _output_codes(self, products: Array, bias: Array, spacing: Array) -> Array:
        assert self.output_scale is not None
        if self.float_bias:
            scaled = (products.astype(np.float32) * spacing + bias.astype(np.float32) * spacing) / self.output_scale
        else:
            scaled = (products + bias).astype(np.float32) * (spacing / self.output_scale)
        return np.asarray(np.clip(np.rint(scaled) + self.output_zero_point, self.low, self.high).astype(np.int64))

    def _by_channel(self, values: Array) -> Array:
        return values.reshape(-1, *[1] * (self.weight.ndim - 2)) if self.is_convolution else values


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """How one layer's output in a runtime compares with the reference."""

    name: str
    codes: int
    """Values compared."""
    differing: int
    """Of these, other than the reference."""
    largest: int
    """Largest difference, in codes."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Every layer of a file in one runtime."""

    runtime: str
    layers: tuple[LayerParity, ...]
    float_layers: tuple[str, ...]
    """Layers of integer weights that the runtime computes in float, and should not."""
    float_outputs: tuple[str, ...] = ()
    """Layers that it computes in float because it has no integer kernel for them (`FileLayer.may_be_float`)."""
    fixed_point: tuple[LayerParity, ...] = ()
    """Layers whose kernels multiply in fixed point, and how far that is from sums that are rounded once; `layers` compares
    them with the very arithmetic of these kernels."""

    @property
    def codes(self) -> int:
        """Values compared, of all layers."""
        return sum(layer.codes for layer in self.layers)

    @property
    def differing_codes(self) -> int:
        """Of these, other than the reference."""
        return sum(layer.differing for layer in self.layers)

    @property
    def differing(self) -> float:
        """Share of all codes that differ."""
        return self.differing_codes / max(1, self.codes)

    def require(self, allowed: float) -> None:
        """Raise BitscapeError unless no layer runs in float and at most the share `allowed` of a layer's codes differs, by one."""
        require_integer(self.runtime, self.float_layers)
        wrong = [layer for layer in self.layers if layer.differing > allowed * layer.codes or layer.largest > 1]
        if wrong:
            worst = max(wrong, key=lambda layer: (layer.largest, layer.differing / layer.codes))
            raise BitscapeError(
                f"{self.runtime} computes {len(wrong)} of {len(self.layers)} layers otherwise than the integers say; worst {worst.name}: "
                f"{worst.differing} of {worst.codes} codes differ, by up to {worst.largest}; do not use this file with this version"
            )


def require_integer(runtime: str, float_layers: Sequence[str]) -> None:
    """Raise BitscapeError if a runtime computes layers of integer weights in float."""
    if float_layers:
        shown = ", ".join(float_layers[:5])
        raise BitscapeError(
            f"{runtime} computes {len(float_layers)} layers in float ({shown}), as it made one operator of them and float ones beside "
            "them, or has no integer kernel: the file would be hardly faster than the float network; quantize the layers beside "
            "them too (keep_float), or try another version of the runtime"
        )


def check_parity(path: str | os.PathLike[str], inputs: Array | Iterable[Feed], runtime: Runtime | None = None) -> ParityReport:
    """Run an exported ONNX file on images and compare every layer with the reference.

    Args:
        path: what `save_onnx` wrote.
        inputs: batches of a few samples by input name, `Interface.feeds`; or images (n, ...) for a file of one input.
        runtime: ONNX Runtime with one thread by default.

    Raises:
        BitscapeError: a file without integer layers, or one that the runtime refuses.
    """
    runtime = runtime or OnnxRuntime()
    with needs_extra("onnx"):
        import onnx
    model = onnx.load(os.fspath(path))
    layers = read_layers(model)
    if not layers:
        raise BitscapeError(f"{os.fspath(path)}: it has no layer of integer weights; give a file of `bitscape export onnx`")
    content, names = _with_outputs(model, layers)
    session = runtime.open(content)
    in_file = {node.name for node in model.graph.node} - {layer.name for layer in layers}  # float in the file, too
    in_float = [name for name in runtime.open(path).float_layers() if name not in in_file]
    return compare_layers(runtime.version, layers, inputs, lambda batch: dict(zip(names, session.run(batch), strict=True)), in_float)


def compare_layers(
    runtime: str,
    layers: Sequence[FileLayer],
    inputs: Array | Iterable[Feed],
    run: Callable[[Feed], Mapping[str, Array]],
    in_float: Sequence[str],
) -> ParityReport:
    """Compare every layer with the reference.

    Args:
        runtime: its name and version.
        layers: of the file.
        inputs: batches by input name, or images (n, ...) of the only one.
        run: returns, for a batch, the inputs and outputs that the layers name.
        in_float: layers of integer weights that the runtime computes in float.
    """
    allowed = {layer.name for layer in layers if layer.may_be_float}
    return ParityReport(
        runtime=runtime,
        layers=_compared(layers, inputs, run, allowed.intersection(in_float)),
        float_layers=tuple(name for name in in_float if name not in allowed),
        float_outputs=tuple(name for name in in_float if name in allowed),
    )


def _compared(
    layers: Sequence[FileLayer], inputs: Array | Iterable[Feed], run: Callable[[Feed], Mapping[str, Array]], in_float: Set[str]
) -> tuple[LayerParity, ...]:
    counts = {layer.name: [0, 0, 0] for layer in layers}
    for batch in _batches(inputs) if isinstance(inputs, np.ndarray) else inputs:
        tensors = run(batch)
        for layer in layers:
            difference = layer.difference(tensors[layer.input], tensors[layer.output], in_float=layer.name in in_float)
            count = counts[layer.name]
            count[0] += difference.size
            count[1] += int(np.count_nonzero(difference))
            count[2] = max(count[2], int(difference.max()))
    return tuple(LayerParity(name=name, codes=n, differing=d, largest=m) for name, (n, d, m) in counts.items())


def _batches(images: Array) -> Iterator[Array]:
    return (images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE))


def _with_outputs(model: "onnx.ModelProto", layers: Sequence[FileLayer]) -> tuple[bytes, list[str]]:
    """The model with every layer's input and output among its outputs, and the names of all outputs in order."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    have = [output.name for output in copied.graph.output]
    for layer in layers:
        result = np.dtype(np.float32) if layer.output_scale is None else layer.output_kind
        for name, dtype in ((layer.input, layer.input_kind), (layer.output, result)):
            if name not in have:
                kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
                copied.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
                have.append(name)
    return bytes(copied.SerializeToString()), have


def read_layers(model: "onnx.ModelProto") -> list[FileLayer]:
    """The integer layers of an ONNX model, in order."""
    graph = _Graph(model)
    return [layer for node in model.graph.node if node.op_type in LAYER_OPERATORS and (layer := graph.layer(node)) is not None]


class _Graph:
    """An ONNX graph with its makers, users and constants by name."""

    def __init__(self, model: "onnx.ModelProto") -> None:
        from onnx import numpy_helper

        self._maker = {name: node for node in model.graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._outputs = {output.name for output in model.graph.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._read = numpy_helper.to_array

    def constant(self, name: str) -> Array | None:
        """Value of a constant, looked up through casts."""
        if name in self._constants:
            return np.asarray(self._read(self._constants[name]))
        maker = self._maker.get(name)
        if maker is not None and maker.op_type == "Cast":
            return self.constant(maker.input[0])
        return np.asarray(self._read(maker.attribute[0].t)) if maker is not None and maker.op_type == "Constant" else None

    def dequantized(self, name: str) -> "onnx.NodeProto | None":
        maker = self._maker.get(name)
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def layer(self, node: "onnx.NodeProto") -> FileLayer | None:
        """The layer that a node computes; None unless its weight is integers. Raises BitscapeError if its input is none."""
        x, w = self.dequantized(node.input[0]), self.dequantized(node.input[1])
        codes = None if w is None else self.constant(w.input[0])
        if w is None or codes is None:
            return None
        if x is None:
            raise BitscapeError(f"layer {node.name}: no DequantizeLinear stands in front of it, so that its codes cannot be compared")
        settings = _attributes(node)
        codes, scale = codes.astype(np.int8), self._known(w.input[1])
        if node.op_type == "MatMul":
            codes = codes.T
        elif node.op_type == "ConvTranspose":
            layout = WeightLayout(scale_axis=_attributes(w).get("axis", 1), transposed_groups=settings.get("group", 1))
            codes = layout.outputs_first(torch.tensor(codes)).numpy()
            scale = layout.of_outputs(torch.tensor(scale), len(codes)).numpy()
        last, bias = self._biased(node)
        return FileLayer(
            name=node.name or node.output[0],
            operator=node.op_type,
            settings=settings,
            input=x.input[0],
            input_scale=np.float32(self._known(x.input[1])),
            input_zero_point=int(self._known(x.input[2])),
            input_kind=self._known(x.input[2]).dtype,
            weight=codes,
            weight_scale=scale,
            bias=np.zeros(1, np.int64) if bias is None else bias.astype(np.int64),
            float_bias=last is not node,
            becomes_output=self._becomes_output(node),
            **self._output(last.output[0]),
        )

    def _becomes_output(self, node: "onnx.NodeProto") -> bool:
        behind: list[onnx.NodeProto] = [node]
        seen: set[str] = set()
        while behind:
            node = behind.pop()
            if node.op_type == "QuantizeLinear":
                if self._known(node.input[2]).itemsize > 1:
                    return True
                continue
            for name in set(node.output) - seen:
                if name in self._outputs:
                    return True
                seen.add(name)  # float branches that meet again are followed once
                behind += self._users.get(name, [])
        return False

    def _known(self, name: str) -> Array:
        value = self.constant(name)
        assert value is not None, f"{name} is no constant"
        return value

    def _biased(self, node: "onnx.NodeProto") -> "tuple[onnx.NodeProto, Array | None]":
        """The node that ends the layer, an Add behind a MatMul, and the bias's integers."""
        users = self._users.get(node.output[0], [])
        if node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add":
            other = next((name for name in users[0].input if name != node.output[0]), "")
            found = self.dequantized(other)
            integers = None if found is None else self.constant(found.input[0])
            return (node, None) if integers is None else (users[0], integers)
        source = self.dequantized(node.input[2]) if len(node.input) > 2 else None
        return node, None if source is None else self._known(source.input[0])

    def _output(self, name: str) -> dict[str, Any]:
        users = self._users.get(name, [])
        if name in self._outputs or len(users) != 1 or users[0].op_type != "QuantizeLinear":
            return {"output": name, "output_scale": None}
        quantize = users[0]
        zero_point = self._known(quantize.input[2])
        found = {
            "output_scale": np.float32(self._known(quantize.input[1])),
            "output_zero_point": int(zero_point),
            "output_kind": zero_point.dtype,
            "high": int(np.iinfo(zero_point.dtype).max),
        }
        users = self._users.get(quantize.output[0], [])
        if len(users) == 1 and users[0].op_type == "Clip":
            low, high = (int(self._known(limit)) for limit in users[0].input[1:3])
            return {**found, "output": users[0].output[0], "low": low, "high": high}
        return {"output": quantize.output[0], **found}


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _torch_padding(pads: Sequence[int]) -> list[int]:
    """ONNX's pads, all begins and then all ends, as F.pad wants them: last dimension first, begin and end together."""
    half = len(pads) // 2
    return [amount for axis in reversed(range(half)) for amount in (pads[axis], pads[half + axis])]
