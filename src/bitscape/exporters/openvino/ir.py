"""OpenVINO IR files: a network with integer layers for OpenVINO, weights in 2, 3, 4, 6 or 8 bits.

The graph is that of the ONNX file (`exporters.onnx.qdq`), read by OpenVINO and changed in three places:

    weights     u2, u3 or u6 constant -> Convert(i8) -> Subtract(2^(b-1)); i4 -> Convert(i8); i8. Folded when OpenVINO loads the file.
                A constant for every product: OpenVINO computes those in float that share one. The .bin file has equal ones once.
    quantizers  behind layers, sums and quantizers: Multiply(1 / scale) -> Round -> Clamp -> FakeQuantize with steps of one;
                elsewhere a FakeQuantize alone
    norms       behind products: a Clamp in front (`_hold_factors`)

Why Round: OpenVINO's CPU plugin does not round a FakeQuantize that comes first behind a convolution if a sum and another FakeQuantize
follow, as on residual edges; and every FakeQuantize adds the zero point before it rounds, which costs float32 the last bits of small
values. Round leaves nothing to change for either, and is fused into the convolution like them: it takes no time. Measured with ResNet-20 at
W4A4 on 2,000 images of CIFAR-10, OpenVINO 2026.4: the ONNX file gives the simulation's class in 94.9 % of them and outputs that differ by
15 %, this file 99.9 % and 0.6 %, as ONNX Runtime does.

OpenVINO computes no convolution in fewer than 8 bits: fewer bits make the file smaller, not the network faster.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.containers import container, container_bytes, layer_containers, scale_bytes
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.integer.graph import layer_of
from bitscape.exporters.integer.weights import input_grid
from bitscape.exporters.onnx.qdq import onnx_model
from bitscape.exporters.onnx.trace import checked_bytes
from bitscape.exporters.openvino.xml import compact
from bitscape.folders import scratch_folder, write_together
from bitscape.runtimes.packages import runtime_module
from bitscape.runtimes.sessions import BEHIND, PRODUCT, layer_of_node, refused

if TYPE_CHECKING:
    import onnx

_log = logging.getLogger("bitscape.exporters")
CONTAINERS = (2, 3, 4, 6, 8)
"""Widths in which OpenVINO stores integers."""
PRODUCTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
"""What layers become."""
ROUNDED = {*PRODUCTS, "Add", "FakeQuantize", "Concat", "ReduceMean"}
"""Operators behind which quantizers round for themselves: else OpenVINO computes a clamped FakeQuantize behind a Concat wrongly, and one
behind a mean of what constants scale. Behind other moves of codes a bare FakeQuantize costs nothing: OpenVINO drops it."""
DEQUANTIZER = {"Multiply", "Subtract", "Convert", "Minimum", "Maximum"}
"""What OpenVINO makes of a DequantizeLinear and the Clip of codes in front of it."""


@dataclass(frozen=True)
class OpenvinoInfo:
    """What an OpenVINO file holds."""

    path: Path
    """The .xml file; the .bin file stands beside it."""
    file_bytes: int
    """Size of both."""
    container_bytes: int
    """Weights in their containers, weight scales, and biases."""
    scale_bytes: int
    """Of it weight scales and biases."""
    containers: dict[str, int]
    """Layer -> bits of the container of its weights."""
    added: int
    """Quantizers of 8 bits that the network's own do not include."""
    source: "onnx.ModelProto" = field(repr=False)
    """The ONNX graph that the file was made of: the same layers, with int8 weights."""


def save_openvino(network: nn.Module, path: str | os.PathLike[str], data: Samples | Inputs) -> OpenvinoInfo:
    """Write a quantized network as an OpenVINO IR with a free batch size.

    A crash leaves the two files old or new, or no .xml file: never one beside the weights of another.

    Args:
        network: calibrated or trained, of static bits.
        path: the .xml file; the weights go into a .bin file beside it.
        data: samples, or what the network is called with, normalized, a few hundred of one shape; they calibrate the
            8-bit quantizers that are added (`placement`).

    Raises:
        BitscapeError: a path that does not end in .xml, missing packages of the extras "onnx" and "openvino"; or as `integer_network`.
    """
    _checked(path)
    return write_openvino(integer_network(network, data), path, data)


def write_openvino(network: IntegerNetwork, path: str | os.PathLike[str], data: Samples | Inputs) -> OpenvinoInfo:
    """As `save_openvino`, for a network in integer form; two of `data` are traced."""
    path = _checked(path)
    model, source = openvino_model(network, data)
    content = _contents(model)
    write_together({path.with_suffix(suffix): part for suffix, part in content.items()})
    file_bytes, stored = sum(map(len, content.values())), layer_containers(network, CONTAINERS)
    stored_bytes, scales = container_bytes(network, CONTAINERS), scale_bytes(network)
    return OpenvinoInfo(path, file_bytes, stored_bytes, scales, stored, len(network.added), source)


def openvino_model(network: IntegerNetwork, data: Samples | Inputs) -> "tuple[Any, onnx.ModelProto]":
    """The network as an openvino.Model, and the ONNX graph that this was made of.

    Raises BitscapeError when the packages of the extras "onnx" and "openvino" are missing.
    """
    openvino = runtime_module("openvino")
    _refuse_wide(network)
    graph = onnx_model(network, data, containers=(8,))
    import onnx_ir as ir

    source = ir.to_proto(graph)
    try:
        model = openvino.Core().read_model(checked_bytes(source))
    except RuntimeError as error:
        raise refused("OpenVINO", "the network", error) from error
    weights = [(node, network.weights[key]) for node in model.get_ops() if (key := _weight_key(node, network)) is not None]
    _fold_constants(model, [(node, _stored(node, container(weight, CONTAINERS))) for node, weight in weights])
    for node in model.get_ordered_ops():
        _rewrite_quantizer(node)
        _hold_factors(node)
    _share_constants(model, network)
    model.validate_nodes_and_infer_types()
    _rename(model, network)
    _name_outputs(model, [output.name for output in source.graph.output])
    return model, source


def refuse_wide(layers: Iterable[str], what: str = "network") -> None:
    """Raise BitscapeError if there are layers of 16-bit activations; `what` has them."""
    if wide := ", ".join(dict.fromkeys(layers)):
        raise BitscapeError(
            f"{what}: layers {wide} take 16-bit activations, and OpenVINO computes in 8; give them 8 bits, or export "
            "to ONNX or as a packed file"
        )


def _refuse_wide(network: IntegerNetwork) -> None:
    graph = network.module.graph
    refuse_wide(network.layers[key] for key in network.weights if input_grid(graph, key).is_wide)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Bytes of a constant u2, u3, u4, i4 or u6, as OpenVINO lays them out.

    u2, u4 and i4 put the first code into the lowest bits. u3 and u6 are split: of 8 or 4 codes, two bytes hold the low 2 or 4 bits of each
    and a third byte the high 1 or 2 bits, the first code in the highest bits.

    Args:
        codes: unsigned, (n,); of i4 the two's complement.
        bits: 2, 3, 4 or 6.
    """
    high_bits = bits & -bits  # 2, 1, 4, 2
    group = 8 // high_bits
    codes = np.pad(codes, (0, -len(codes) % group))
    if high_bits == bits:
        return _joined(codes, bits)
    low_bits = np.uint8(bits - high_bits)
    low = _joined(codes & (2**low_bits - 1), int(low_bits), reverse=True)
    high = _joined(codes >> low_bits, high_bits, reverse=True)
    return np.concatenate([low.reshape(-1, 2), high.reshape(-1, 1)], axis=1).reshape(-1)


def _joined(codes: NDArray[np.uint8], width: int, reverse: bool = False) -> NDArray[np.uint8]:
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    parts = codes.reshape(-1, len(shifts)) << (shifts[::-1] if reverse else shifts)
    return np.asarray(np.bitwise_or.reduce(parts, axis=1))


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".xml":
        raise BitscapeError(f"path: {path} does not end in .xml; OpenVINO finds the weights as a .bin file beside an .xml file")
    return path


def _contents(model: Any) -> dict[str, bytes]:
    """Suffix -> content of the file; weights first, for a new graph must not meet old ones."""
    openvino = runtime_module("openvino")
    with scratch_folder() as folder:
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        binary, graph = ((folder / f"model{suffix}").read_bytes() for suffix in (".bin", ".xml"))
    return {".bin": binary, ".xml": compact(graph)}


def _weight_key(node: Any, network: IntegerNetwork) -> str | None:
    """Key of the weight whose codes a constant holds; None for any other node."""
    name = str(node.get_friendly_name())
    key = name.removesuffix(".codes").removesuffix(".transposed")
    return key if node.get_type_name() == "Constant" and name.endswith(".codes") and key in network.weights else None


def _weight_of(product: Any, network: IntegerNetwork) -> str | None:
    """Key of the weight that a product takes; None where its second operand is made of no codes."""
    node = product
    while node.get_input_size():
        node = node.input_value(1 if node is product else 0).get_node()
    return _weight_key(node, network)


def _stored(constant: Any, bits: int) -> Any:
    """What gives the same codes as an i8 constant from one of `bits`."""
    if bits == 8:
        return constant
    openvino = runtime_module("openvino")
    op = openvino.opset13
    signed, offset = bits == 4, 2 ** (bits - 1)  # of these widths it alone has a signed type
    codes = constant.data.astype(np.int16) + (0 if signed else offset)
    memory = openvino.Tensor(getattr(openvino.Type, f"{'i' if signed else 'u'}{bits}"), list(codes.shape))
    memory.data[:] = pack((codes & (2**bits - 1)).astype(np.uint8).reshape(-1), bits)
    # Without the step to i8, OpenVINO takes it for weights that are to be computed in float.
    small = op.convert(op.constant(memory, name=constant.get_friendly_name()), "i8")
    return small if signed else op.subtract(small, op.constant(np.int8(offset)))


def _fold_constants(model: Any, weights: Sequence[tuple[Any, Any]]) -> None:
    """Compute what depends on constants only, all but weights; put the second of each pair of nodes in the place of the first.

    Biases become float32 constants, the same values: read from ONNX, each comes with ten nodes that find its shape.
    """
    op, passes = runtime_module("openvino.opset13"), runtime_module("openvino.passes")
    held = [op.parameter(node.get_output_shape(0), node.get_element_type()) for node, _ in weights]
    for parameter, (node, _) in zip(held, weights, strict=True):
        _replace(node, parameter)
    model.add_parameters(held)
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    for parameter, (_, stored) in zip(held, weights, strict=True):
        _replace(parameter, stored)
        model.remove_parameter(parameter)


def _share_constants(model: Any, network: IntegerNetwork) -> None:
    """Let equal constants be one, all but codes of weights: of those every product needs its own."""
    first: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and _weight_key(node, network) is None:
            key = str(node.get_element_type()), tuple(node.get_output_shape(0)), node.data.tobytes()
            if (same := first.setdefault(key, node)) is not node:
                _replace(node, same)


def _replace(node: Any, by: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(by.output(0))


def _rewrite_quantizer(node: Any) -> None:
    """If `node` ends a dequantizer behind a quantizer, put one FakeQuantize in the place of both."""
    quantizer, constants = _quantizer_before(node)
    if quantizer is None:
        return
    op = runtime_module("openvino.opset13")
    scale, zero_point = np.float32(constants["Multiply"]), constants["Subtract"]
    x, step = quantizer.input_value(0), scale
    low, high = (constants.get(name, end) - zero_point for name, end in (("Maximum", 0), ("Minimum", 255)))
    if x.get_node().get_type_name() in ROUNDED:
        x, step = op.round(op.multiply(x, np.float32(1) / scale), "half_to_even"), np.float32(1)
    if "Maximum" in constants:
        x = op.clamp(x, float(low * step), float(high * step))
    ends = [np.float32(end - zero_point) for end in (0, 255)]
    _replace(node, op.fake_quantize(x, *(step * end for end in ends), *(scale * end for end in ends), 256))


def _quantizer_before(node: Any) -> tuple[Any, dict[str, float]]:
    """The FakeQuantize whose codes `node` scales, or None, and the constants met on the way, by operator."""
    constants: dict[str, float] = {}
    if node.get_type_name() != "Multiply":
        return None, constants
    while node.get_type_name() in DEQUANTIZER:
        inputs = [value.get_node() for value in node.input_values()]
        fixed = [other for other in inputs if other.get_type_name() == "Constant"]
        rest = [other for other in inputs if other.get_type_name() != "Constant"]
        if len(rest) != 1 or any(other.data.size != 1 for other in fixed):
            return None, constants
        if fixed:
            constants[node.get_type_name()] = float(fixed[0].data.reshape(-1)[0])
        node = rest[0]
    return (node if node.get_type_name() == "FakeQuantize" and "Subtract" in constants else None), constants


def _hold_factors(node: Any) -> None:
    """If `node` multiplies a product's channels or tokens with constants, as norms do, put a Clamp in front of it that changes nothing.

    OpenVINO would make them part of the product's own scales, which its integer kernel takes for those of the last axis whatever they are.
    """
    inputs = [value.get_node() for value in node.input_values()]
    factors = [other.data.size for other in inputs if other.get_type_name() == "Constant"]
    if node.get_type_name() not in ("Multiply", "BatchNormInference") or max(factors, default=1) == 1 or len(factors) == len(inputs):
        return
    at = next(index for index, other in enumerate(inputs) if other.get_type_name() != "Constant")
    source = inputs[at]
    while source.get_type_name() in ("Add", "Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    if source.get_type_name() == "MatMul":
        largest = float(np.finfo(np.float32).max)
        node.input(at).replace_source_output(runtime_module("openvino.opset13").clamp(node.input_value(at), -largest, largest).output(0))


def _rename(model: Any, network: IntegerNetwork) -> None:
    """Give nodes names that tell their layer, or number them.

    OpenVINO's own numbers go on through a process, and the same network must give the same file. Of a layer's nodes it keeps a name,
    so those from its product to its quantizer all have the layer's.
    """
    made = 0
    owners = sorted(map(layer_of, network.weights), key=len, reverse=True)  # "a/b" in front of "a"

    def owner(node: Any) -> str | None:
        name = node.get_friendly_name()
        return next((layer for layer in owners if name == layer or name.startswith((f"{layer}/", f"{layer}:"))), None)

    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() not in ("Parameter", "Result")]
    for node in nodes:  # OpenVINO names these products so, except for transposed convolutions
        user = only_user(node) if node.get_type_name() in PRODUCTS else None
        if user is None or user.get_type_name() != "Add":
            continue
        if owner(user) is None and (key := _weight_of(node, network)) is not None:
            user.set_friendly_name(layer_of(key))  # what becomes an output may have lost its name
        if owner(user) is not None:
            node.set_friendly_name(user.get_friendly_name() + PRODUCT)
    kept = {node.get_friendly_name() for node in nodes if owner(node) is not None}
    for node in nodes:
        name = node.get_friendly_name()
        if name in kept:
            for behind in _until_quantized(node):
                if behind.get_friendly_name() not in kept:
                    made += 1
                    behind.set_friendly_name(f"{layer_of_node(name)}{BEHIND}{made}")
                    kept.add(behind.get_friendly_name())
    for index, node in enumerate(nodes):
        if node.get_friendly_name() not in kept and _weight_key(node, network) is None:
            node.set_friendly_name(f"n{index}")


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Give outputs the names that those of the ONNX graph have: what took a node's place has lost them."""
    for output in model.outputs:
        output.get_tensor().set_names(set())
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().add_names({name})


def _until_quantized(node: Any) -> Iterator[Any]:
    """What alone takes the node's results, and so on, to the next quantizer."""
    while node.get_type_name() != "FakeQuantize":
        user = only_user(node)
        if user is None or user.get_type_name() in (*PRODUCTS, "Result"):
            return
        node = user
        yield node


def only_user(node: Any) -> Any | None:
    """The one node that takes what `node` gives; None if there are others, or none."""
    users = [target.get_node() for target in node.output(0).get_target_inputs()] if node.get_output_size() == 1 else []
    return users[0] if len(users) == 1 else None
