"""ONNX files for integer runtimes: QuantizeLinear and DequantizeLinear around every operator, weights in as few bits as ONNX has.

The form that ONNX Runtime fuses into integer kernels, and OpenVINO too:

    weights      INT2, INT4 or INT8 codes -> Cast to INT8 -> DequantizeLinear, one scale per output channel. The cast is folded when the
                 file is loaded; without it, runtimes compute a layer of INT4 weights in float, or refuse INT2.
    biases       INT32, of input scale times weight scale -> DequantizeLinear
    activations  QuantizeLinear to UINT8, below 8 bits a Clip of the codes -> DequantizeLinear; of 16 bits UINT16, which ONNX Runtime
                 computes in float

No operator of ONNX computes in fewer than 8 bits: fewer bits make the file smaller, not the network faster.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.containers import container, container_bytes, layer_containers, scale_bytes
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.integer.graph import FAKE_QUANTIZE, ActivationGrid, layer_of
from bitscape.exporters.integer.interface import as_samples, example_of
from bitscape.exporters.integer.weights import bias_name, input_scale
from bitscape.exporters.onnx.marks import DOMAIN, MARK, MARKED, mark_node, with_marks
from bitscape.exporters.onnx.trace import checked_bytes, onnx_graph, pad_circularly, pool_globally
from bitscape.files import write_atomic

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_log = logging.getLogger("bitscape.exporters")
CONTAINERS = (2, 4, 8)
"""Widths in which ONNX stores integers."""
PORTABLE = (4, 8)
"""Those that other runtimes than ONNX Runtime read."""
LAYER_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What layers become; these nodes carry the layer's name."""
OPSETS = {2: (25, 13), 4: (21, 10), 8: (21, 10)}
"""Smallest container in a file -> operator set and IR version that know it; newer ones are refused by ONNX Runtime 1.31."""


@dataclass(frozen=True)
class OnnxInfo:
    """What an ONNX file holds."""

    path: Path
    """The file."""
    file_bytes: int
    """Its size."""
    container_bytes: int
    """Weights in their containers, weight scales, and biases."""
    scale_bytes: int
    """Of it weight scales and biases."""
    containers: dict[str, int]
    """Layer -> bits of the container of its weights."""
    added: int
    """Quantizers of 8 bits that the network's own do not include."""


def save_onnx(
    network: nn.Module, path: str | os.PathLike[str], data: Samples | Inputs, *, containers: Sequence[int] = CONTAINERS
) -> OnnxInfo:
    """Write a quantized network as an ONNX file with a free batch size; a crash leaves the old file or the new one.

    Args:
        network: calibrated or trained, of static bits.
        path: the file, usually `.onnx`.
        data: samples, or what the network is called with, normalized, a few hundred of one shape; they calibrate the
            8-bit quantizers that are added (`placement`).
        containers: widths that weights may be stored in; PORTABLE for other runtimes than ONNX Runtime.

    Raises:
        BitscapeError: the packages of the extra "onnx" are missing; or as `integer_network`.
    """
    return write_onnx(integer_network(network, data), path, data, containers=containers)


def write_onnx(
    network: IntegerNetwork, path: str | os.PathLike[str], data: Samples | Inputs, *, containers: Sequence[int] = CONTAINERS
) -> OnnxInfo:
    """As `save_onnx`, for a network in integer form; two of `data` are traced."""
    model = onnx_model(network, data, containers=containers)
    content = checked_bytes(_compact(model))
    write_atomic(path, content)
    stored = layer_containers(network, containers)
    return OnnxInfo(
        Path(path), len(content), container_bytes(network, containers), scale_bytes(network), stored, len(network.added)
    )


def onnx_model(network: IntegerNetwork, data: Samples | Inputs, *, containers: Sequence[int] = CONTAINERS) -> "ir.Model":
    """The network as an onnx_ir model. Raises BitscapeError when the packages of the extra "onnx" are missing."""
    if not containers or not set(containers) <= set(CONTAINERS):
        allowed = ", ".join(map(str, CONTAINERS))
        raise BitscapeError(f"containers = {containers!r}: ONNX stores integers of {allowed} bits; give some of them")
    operators: dict[Any, Callable[..., Any]] = {FAKE_QUANTIZE: _quantize_dequantize, MARKED: mark_node}
    example = example_of(as_samples(data), network.module)
    model = onnx_graph(with_marks(network), network.interface, example, operators, opset=OPSETS[4][0], free_batch=True)
    import onnx_ir as ir

    writer = _Writer(model.graph, network, containers)
    for node in list(model.graph):
        if node.op_type in LAYER_OPERATORS:
            writer.rewrite(node)
        elif node.op_type == MARK:
            writer.replace_bias(node)
        pool_globally(node)
        pad_circularly(node)
    del model.opset_imports[DOMAIN]
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    smallest = min((container(w, containers) for w in network.weights.values()), default=8)
    model.opset_imports[""], model.ir_version = OPSETS[smallest]
    model.producer_name, model.graph.name = "bitscape", "quantized network"
    return model


def _quantize_dequantize(x: Any, scale: float, zero_point: float, qmin: int, qmax: int) -> Any:
    """What a fake-quantize node becomes. Called by torch.onnx with onnxscript's values."""
    import onnxscript

    op: Any = onnxscript.opset21  # its types know no ONNX tensors
    grid = ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)
    kind = np.uint16 if grid.is_wide else np.uint8
    cuts = (qmin, qmax) != (0, grid.top)
    if cuts and grid.is_wide:  # ONNX Runtime clips no uint16
        low, high = (np.array(scale, np.float32) * np.float32(code - zero_point) for code in (qmin, qmax))
        x = op.Clip(x, op.Constant(value=_tensor(low)), op.Constant(value=_tensor(high)))
    spacing, zero = op.Constant(value_float=scale), op.Constant(value=_tensor(np.array(int(zero_point), kind)))
    codes = op.QuantizeLinear(x, spacing, zero)
    if cuts and not grid.is_wide:
        # On the integers: a Clip of floats in front keeps runtimes from fusing.
        codes = op.Clip(codes, *(op.Constant(value=_tensor(np.array(code, kind))) for code in (qmin, qmax)))
    return op.DequantizeLinear(codes, spacing, zero)


def _tensor(value: Any) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(np.asarray(value))


class _Writer:
    """Puts integers in the place of float weights and biases."""

    def __init__(self, graph: "ir.Graph", network: IntegerNetwork, containers: Sequence[int]) -> None:
        self.graph = graph
        self.network = network
        self.containers = containers
        self.biases = {bias_name(key): key for key in network.biases}

    def rewrite(self, node: "ir.Node") -> None:
        """Let a layer take its integers."""
        maker = _maker(node.inputs[1])
        transposed = maker is not None and maker.op_type == "Transpose"
        mark = _maker(maker.inputs[0]) if maker is not None and transposed else maker
        if mark is None or mark.op_type != MARK:
            self._keep_float(node)
            return
        key = mark.attributes["name"].as_string()
        node.name = layer_of(key)
        # ONNX Runtime fuses a product, other than a convolution, only with a zero point.
        node.replace_input_with(1, self._weight(key, transposed, zero_points=node.op_type in ("Gemm", "MatMul")))
        if node.op_type == "Conv":
            _absorb_padding(node)
        elif node.op_type == "Gemm":
            self._keep_integer(node)

    def _keep_integer(self, node: "ir.Node") -> None:
        """ONNX Runtime makes one float operator of a Gemm and a rectifier behind it, unless a quantizer or another operator parts them."""
        import onnx_ir as ir

        uses = list(node.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type != "QuantizeLinear":
            maximum = ir.node("Max", [node.outputs[0]])
            self.graph.insert_after(node, maximum)
            uses[0].node.replace_input_with(uses[0].idx, maximum.outputs[0])

    def _keep_float(self, node: "ir.Node") -> None:
        """ONNX Runtime quantizes float weights right behind a DequantizeLinear by its own lights; a maximum of one tensor keeps it off."""
        import onnx_ir as ir

        maker = _maker(node.inputs[0])
        if node.op_type != "MatMul" and maker is not None and maker.op_type == "DequantizeLinear":
            maximum = ir.node("Max", [node.inputs[0]])
            self.graph.insert_before(node, maximum)
            node.replace_input_with(0, maximum.outputs[0])

    def _weight(self, key: str, transposed: bool, zero_points: bool) -> "ir.Value":
        weight = self.network.weights[key]
        bits, channels, axis = container(weight, self.containers), len(weight.scale), weight.layout.scale_axis
        codes = weight.q.cpu().numpy().astype(np.int8)
        name, codes = (f"{key}.transposed", np.ascontiguousarray(codes.T)) if transposed else (key, codes)
        stored = self._initializer(f"{name}.codes", codes, bits)
        scale = self._initializer(f"{key}.scale", weight.scale.cpu().numpy())
        zeros = self._initializer(f"zero_points.{channels}", np.zeros(channels, np.int8)) if zero_points else None
        return self._dequantized(stored, scale, zeros, axis=int(transposed) or axis, cast=bits < 8)

    def replace_bias(self, mark: "ir.Node") -> None:
        """Put a bias's integers in the place of its mark; marks of weights stay, for layers to find."""
        import onnx_ir as ir

        name = mark.attributes["name"].as_string()
        if (key := self.biases.get(name)) is None:
            return
        spacing = self.network.weights[key].output_scale.cpu().numpy() * np.float32(input_scale(self.network.module.graph, key))
        codes = self._initializer(f"{name}.codes", self.network.biases[key].cpu().numpy().astype(np.int32))
        found = self._dequantized(codes, self._initializer(f"{name}.scale", spacing), None, axis=0, cast=False)
        ir.convenience.replace_all_uses_with(mark.outputs[0], found)

    def _initializer(self, name: str, array: np.ndarray[Any, Any], bits: int | None = None) -> "ir.Value":
        import ml_dtypes
        import onnx_ir as ir

        if name in self.graph.initializers:
            return self.graph.initializers[name]
        if bits is not None and bits < 8:
            array = array.astype({2: ml_dtypes.int2, 4: ml_dtypes.int4}[bits])
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def _dequantized(self, codes: "ir.Value", scale: "ir.Value", zeros: "ir.Value | None", *, axis: int, cast: bool) -> "ir.Value":
        import onnx_ir as ir

        nodes = []
        if cast:
            nodes.append(ir.node("Cast", [codes], {"to": ir.DataType.INT8}))
            codes = nodes[-1].outputs[0]
        nodes.append(ir.node("DequantizeLinear", [codes, scale, *([zeros] if zeros else [])], {"axis": axis}))
        self.graph.insert_before(self.graph[0], nodes)
        return nodes[-1].outputs[0]


def _maker(value: "ir.Value | None") -> "ir.Node | None":
    return None if value is None else value.producer()


def _absorb_padding(node: "ir.Node") -> None:
    """Make zero padding in front of a convolution its own: runtimes fuse only what stands right behind a DequantizeLinear."""
    import onnx_ir as ir

    pad = _maker(node.inputs[0])
    if pad is None or pad.op_type != "Pad":  # others stand behind a quantizer (`is_own_padding`)
        return
    widths = ir.convenience.get_const_tensor(pad.inputs[1])  # type: ignore[arg-type]  # it has widths
    assert widths is not None, "the widths of padding are numbers"
    amounts: list[int] = widths.numpy().tolist()  # in front of every dimension, then behind
    half = len(amounts) // 2
    outer = amounts[2:half] + amounts[half + 2 :]
    own = node.attributes.get_ints("pads", [0] * len(outer))
    node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, outer, strict=True)])
    node.replace_input_with(0, pad.inputs[0])


def _compact(model: "ir.Model") -> "onnx.ModelProto":
    """Store equal constants once, and leave out what runtimes infer or do not need: shapes, and most names of nodes.

    In a small network these take more room than the weights.
    """
    import onnx_ir as ir

    ir.passes.common.DeduplicateInitializersPass(size_limit=sys.maxsize)(model)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        if node.op_type not in LAYER_OPERATORS:
            node.ClearField("name")
    return proto
