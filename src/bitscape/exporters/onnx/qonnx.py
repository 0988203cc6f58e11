"""QONNX files, for tools that build hardware of any bit-width: FINN, hls4ml.

Every quantizer of the network is one `Quant` node where the network has it; norms, additions and the rest stay floating-point operators.
Executed by qonnx, the nodes compute the very numbers that the network's quantizers do:

    quantizer                          Quant node: scale * (clip(round(x / scale + zero_point)) - zero_point)
    weights, zero on the grid          scale (C, 1, ...) or one, zero point 0, b bits, signed; the weight in front lies on the grid
    weights without zero, 1 bit        half the scale, 1 bit, signed: QONNX's single signed bit is -1 or 1
    weights without zero, b bits       half the scale, b + 1 bits, signed, narrow: the odd integers. A zero point of -1/2 would give the
                                       same numbers in b bits, but FINN takes no zero point, and qonnx counts such weights as 32 bits
    activations                        one scale, zero point 0, b bits, signed or not; a single signed bit as for weights (values from
                                       -2^-25 scales to 0 become -1, while the network's rounding gives them 1)
    signed activations of PACT         the same, narrow: clipping at -clip..clip never reaches the lowest code
    activations from a lower code on   unsigned, with their zero point; hls4ml takes it, FINN does not. Values halfway between two
                                       levels go to the other one where the zero point is odd: Quant adds it before it rounds
    activations of LSQ+                the same; their zero point is a fraction

The batch size is fixed at one image: qonnx reads an open size as 0. Equal quantizers of one tensor are one node.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.cost.layers import measure
from bitscape.data.samples import Samples
from bitscape.exporters.integer.graph import FAKE_QUANTIZE, ActivationGrid, Traced, grid_of, layer_of, trace
from bitscape.exporters.integer.interface import as_samples, example_of
from bitscape.exporters.onnx.trace import checked_bytes, onnx_graph, pad_circularly, pool_globally
from bitscape.files import write_atomic
from bitscape.quant.grid import MID_RISE
from bitscape.quant.quantizers.base import Codes

if TYPE_CHECKING:
    import onnx_ir as ir

_log = logging.getLogger("bitscape.exporters")
DOMAIN = "qonnx.custom_op.general"
OPSET, IR_VERSION = 18, 8
"""What torch.onnx writes without conversion, and the IR version that belongs to it; qonnx 1.0 on ONNX Runtime takes up to 13."""


@dataclass(frozen=True)
class QonnxInfo:
    """What a QONNX file holds."""

    path: Path
    """The file."""
    file_bytes: int
    """Its size; weights are float32 in it."""
    bits: Mapping[str, tuple[int, int]]
    """Layer -> bits of weight and input in its Quant nodes: the network's, one more for weights of two bits or more without a zero."""
    macs: Mapping[tuple[int, int], int]
    """These pairs of bits -> multiply-accumulates of one image."""
    weight_bits: int
    """Sum over the layers of weights times bits."""

    @property
    def bitops(self) -> int:
        """BitOps of one image, in the file's bits."""
        return sum(macs * weight * activation for (weight, activation), macs in self.macs.items())


def save_qonnx(network: nn.Module, path: str | os.PathLike[str], data: Samples | Inputs) -> QonnxInfo:
    """Write a quantized network as a QONNX file for one image at a time; a crash leaves the old file or the new one.

    Args:
        network: calibrated or trained, of static bits; any of bitscape's quantizers.
        path: the file, usually `.onnx`.
        data: samples, or what the network is called with, two at least, of one shape; only shapes count.

    Raises:
        BitscapeError: the packages of the extra "onnx" are missing; or as `trace`.
    """
    traced = trace(network, data)
    sample = example_of(as_samples(data), network, count=1)
    forms = {key: weight_form(codes, traced.bits[key].weight) for key, codes in traced.codes.items()}
    warn_of_zero_points(traced)
    content = checked_bytes(_model(traced, forms, sample))
    write_atomic(path, content)
    bits = {layer_of(key): (form.bits, traced.bits[key].activation) for key, form in forms.items()}
    layers = [layer for layer in measure(network, sample).layers if layer.name in bits]
    macs: Counter[tuple[int, int]] = Counter()
    for layer in layers:
        macs[bits[layer.name]] += layer.macs
    weight_bits = sum(layer.weights * bits[layer.name][0] for layer in layers)
    return QonnxInfo(Path(path), len(content), bits, macs, weight_bits)


@dataclass(frozen=True, eq=False)
class WeightForm:
    """A signed Quant node of zero point 0 that leaves a weight as it is."""

    scale: Tensor
    """float32, 0-d or (C, 1, ...)."""
    bits: int
    """1 to 9."""
    narrow: bool
    """Whether the lowest code is left out."""


def weight_form(codes: Codes, bits: int) -> WeightForm:
    """The Quant node for a weight of `bits`; see the table above."""
    if codes.zero_point != MID_RISE:
        return WeightForm(codes.scale, bits, narrow=False)
    # scale * (q + 1/2) = scale / 2 * (2 q + 1); halves are exact
    return WeightForm(codes.scale / 2, 1, narrow=False) if bits == 1 else WeightForm(codes.scale / 2, bits + 1, narrow=True)


def warn_of_zero_points(traced: Traced) -> None:
    """Log how many activations FINN would refuse."""
    grids = [grid_of(node) for node in traced.module.graph.nodes if node.target is FAKE_QUANTIZE]
    shifted = sum(_zero_point(grid) != 0 for grid in grids)
    if shifted:
        _log.warning(
            "%d of %d activation grids have a zero point: hls4ml takes it, FINN does not; for FINN quantize with "
            "Lsq(zero_points=False)",
            *(shifted, len(grids)),
        )


def _zero_point(grid: ActivationGrid) -> float:
    """The zero point of an unsigned Quant node; 0 for grids that are plainly signed or unsigned."""
    if grid.zero_point == MID_RISE or -grid.qmin in (grid.qmax, grid.qmax + 1):
        return 0.0
    return grid.zero_point - grid.qmin


@torch.library.custom_op("bitscape::quantized_weight", mutates_args=())
def _quantized_weight(weight: Tensor, scale: Tensor, bits: int, narrow: bool) -> Tensor:
    return weight.clone()  # it lies on the grid already


@_quantized_weight.register_fake
def _(weight: Tensor, scale: Tensor, bits: int, narrow: bool) -> Tensor:
    return torch.empty_like(weight)


QUANTIZED_WEIGHT = torch.ops.bitscape.quantized_weight.default


def _model(traced: Traced, forms: Mapping[str, WeightForm], sample: Inputs) -> Any:
    _insert_weight_quantizers(traced, forms)
    operators: dict[Any, Callable[..., Any]] = {FAKE_QUANTIZE: _activation_node, QUANTIZED_WEIGHT: _weight_node}
    model = onnx_graph(traced.module, traced.interface, sample, operators, opset=OPSET, free_batch=False)
    return _finished(model)


def _insert_weight_quantizers(traced: Traced, forms: Mapping[str, WeightForm]) -> None:
    """Put a node behind every quantized weight, so that the exporter folds no norm into the weight and moves nothing past the quantizer."""
    module, graph = traced.module, traced.module.graph
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in forms:
            continue
        form, (owner, _, attribute) = forms[node.target], node.target.rpartition(".")
        module.get_submodule(owner).register_buffer(f"{attribute}_scale", form.scale)
        with graph.inserting_after(node):
            scale = graph.get_attr(f"{node.target}_scale")
        with graph.inserting_after(scale):
            quantized = graph.call_function(QUANTIZED_WEIGHT, (node, scale, form.bits, form.narrow))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user, new=quantized: user is not new)
    module.recompile()


def _weight_node(weight: Any, scale: Any, bits: int, narrow: bool) -> Any:
    return _quant_node(weight, scale, 0.0, bits, signed=True, narrow=narrow)


def _activation_node(x: Any, scale: float, zero_point: float, qmin: int, qmax: int) -> Any:
    grid = ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)
    bits, shift = (qmax - qmin).bit_length(), _zero_point(grid)
    signed = qmin < 0 and shift == 0
    if zero_point == MID_RISE:
        scale = scale / 2  # -1/2 and 1/2 of the scale, as -1 and 1
    return _quant_node(x, _constant(scale), shift, bits, signed=signed, narrow=signed and qmin == -qmax)


def _quant_node(x: Any, scale: Any, zero_point: float, bits: int, *, signed: bool, narrow: bool) -> Any:
    import onnxscript

    quant = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), "Quant", _schema())
    zero, width = _constant(zero_point), _constant(float(bits))
    return quant(x, scale, zero, width, signed=int(signed), narrow=int(narrow), rounding_mode="ROUND")


def _constant(value: float) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18  # its types know no ONNX tensors
    return op.Constant(value_float=value)


def _schema() -> Any:
    """The signature of Quant; onnx knows none of qonnx's operators, and onnxscript asks for it."""
    from onnx.defs import OpSchema

    parameter, attribute, kinds = OpSchema.FormalParameter, OpSchema.Attribute, OpSchema.AttrType
    return OpSchema(
        "Quant",
        DOMAIN,
        1,
        inputs=[parameter(name, "tensor(float)") for name in ("x", "scale", "zero_point", "bits")],
        outputs=[parameter("y", "tensor(float)")],
        attributes=[
            attribute("signed", kinds.INT),
            attribute("narrow", kinds.INT),
            attribute("rounding_mode", kinds.STRING),
        ],
    )


def _finished(model: "ir.Model") -> Any:
    import onnx_ir as ir

    for node in list(model.graph):
        pool_globally(node)
        pad_circularly(node)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.graph.name = "bitscape", "quantized network"
    return ir.to_proto(model)
