"""Does OpenVINO compute its own files as integers say it must?

Every layer is compared with the reference of `parity`, which works on the codes that OpenVINO fed to the layer. The integers are those
of the graph that the file was made of, not read from the file: a weight that is stored wrongly is found, too. Layers and quantizers are
asked for their results by further outputs of the same graph; this costs OpenVINO some of the fusions, so that whole networks must be
compared as well (`agreement`).
"""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bitscape.errors import BitscapeError
from bitscape.exporters.openvino.ir import PRODUCTS, only_user
from bitscape.exporters.parity import Array, FileLayer, ParityReport, compare_layers, read_layers
from bitscape.folders import scratch_folder
from bitscape.runtimes.packages import runtime_module
from bitscape.runtimes.sessions import PRODUCT, Feed, OpenVino

if TYPE_CHECKING:
    import onnx

BETWEEN = 1e-3
"""How far from a code, in codes, a quantized value may lie: it was scaled in float32."""


def check_openvino_parity(
    path: str | os.PathLike[str],
    source: "onnx.ModelProto",
    inputs: Array | Iterable[Feed],
    runtime: OpenVino | None = None,
) -> ParityReport:
    """Run an exported OpenVINO file on images and compare every layer with the reference.

    Args:
        path: the .xml file that `write_openvino` wrote.
        source: the graph that it was made of, of the `OpenvinoInfo`.
        inputs: batches of a few samples by input name, `Interface.feeds`; or images (n, ...) for a file of one input.
        runtime: with one thread by default.

    Raises:
        BitscapeError: a layer of the network that the file does not have, values that lie between codes, or a file that OpenVINO refuses.
    """
    runtime = runtime or OpenVino()
    openvino = runtime_module("openvino")
    layers = read_layers(source)
    if not layers:
        raise BitscapeError(f"{os.fspath(path)}: the network has no layer of integer weights, so that nothing can be compared")
    model = openvino.Core().read_model(os.fspath(path))
    tapped = _taps(model, layers)
    model.add_outputs([port for port, _ in tapped.values()])  # of two equal ones, or one that is an output already, one is there
    position = {_key(result.get_node().input_value(0)): index for index, result in enumerate(model.outputs)}
    with scratch_folder() as folder:
        file = folder / "with_outputs.xml"
        openvino.save_model(model, file, compress_to_fp16=False)
        session = runtime.open(file)

    def run(batch: Feed) -> Mapping[str, Array]:
        values = session.run(batch)
        return {name: read(values[position[_key(port)]]) for name, (port, read) in tapped.items()}

    names = {layer.name for layer in layers}
    in_float = [name for name in runtime.open(path).float_layers() if name in names]  # others are in float in the network, too
    return compare_layers(runtime.version, layers, inputs, run, in_float)


def _taps(model: Any, layers: list[FileLayer]) -> dict[str, tuple[Any, Any]]:
    """Name of a tensor that a layer takes or makes -> where the graph has it, and what makes codes of its values."""
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    taps: dict[str, tuple[Any, Any]] = {}
    for layer in layers:
        product = nodes.get(layer.name + PRODUCT, nodes.get(layer.name))
        if product is None or product.get_type_name() not in PRODUCTS:
            raise BitscapeError(f"layer {layer.name}: the OpenVINO file has no such layer; export the network again")
        taps[layer.input] = (product.input_value(0), _reader(layer.name, layer.input_scale, layer.input_zero_point))
        has_bias = layer.float_bias or product.get_friendly_name() != layer.name
        end = _behind(product, "Add") if has_bias else product
        if layer.output_scale is None:
            taps[layer.output] = (end.output(0), np.asarray)
        else:
            quantizer = _behind(end, "FakeQuantize")
            taps[layer.output] = (quantizer.output(0), _reader(layer.name, layer.output_scale, layer.output_zero_point))
    return taps


def _key(port: Any) -> tuple[str, int]:
    return port.get_node().get_friendly_name(), port.get_index()


def _behind(node: Any, kind: str) -> Any:
    """The next operator of a kind on the only way on."""
    name = node.get_friendly_name()
    while (node := only_user(node)) is not None:
        if node.get_type_name() == kind:
            return node
    raise BitscapeError(f"layer {name}: the OpenVINO file has no {kind} behind it; export the network again")


def _reader(layer: str, scale: np.float32, zero_point: int) -> Any:
    def codes(values: Array) -> Array:
        exact = values / np.float64(scale) + zero_point
        found = np.rint(exact)
        if np.abs(exact - found).max() > BETWEEN:
            raise BitscapeError(
                f"layer {layer}: OpenVINO does not round its input or output to codes; do not use this file with this version"
            )
        return found.astype(np.int64)

    return codes
