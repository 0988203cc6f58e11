"""TFLite files: a network with integer operators alone, for LiteRT, CMSIS-NN, and the compilers of NPUs such as Arm's Vela.

    activations  int8, of 16 bits int16; each tensor has a scale and a zero point, and what has fewer bits is cut off at its own limits.
                 The image and the outputs are int8 as well: real = scale * (q - zero point), as the file says of each.
    weights      int8, of which a layer of b bits uses 2^b values; with weights="int4", layers of at most 4 bits are int4, two a byte.
                 One scale for each output channel.
    biases       int32, behind int16 activations int64, of input scale times weight scale
    images       one at a time, channels last: (1, height, width, channels)

A file has no float operator: what has no integer one is an error, and outputs get 8 bits. No tensor is kept in fewer than 8 bits but int4
weights; runtimes compute in int8. But compilers that compress weights without loss, as Vela does, make of b-bit values about b bits.

The schema (https://github.com/google-ai-edge/LiteRT, tflite/converter/schema/schema.fbs) comes with the package `ai-edge-litert`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from bitscape.calling import Inputs, first_rows
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.containers import container_bytes, layer_containers, scale_bytes
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.integer.interface import as_samples
from bitscape.exporters.tflite.fit import fit
from bitscape.exporters.tflite.operators import NARROW_BITS, Storage, Writer
from bitscape.files import write_atomic
from bitscape.quant.convert import batches_of


@dataclass(frozen=True)
class TfliteInfo:
    """What a TFLite file holds."""

    path: Path
    """The file."""
    file_bytes: int
    """Its size."""
    container_bytes: int
    """Weights in their containers, weight scales, and biases."""
    scale_bytes: int
    """Of it weight scales and biases."""
    containers: dict[str, int]
    """Layer -> bits of the container of its weights, 4 or 8."""
    added: int
    """Quantizers of 8 bits that the network's own do not include."""


def save_tflite(
    network: nn.Module,
    path: str | os.PathLike[str],
    data: Samples | Inputs,
    *,
    weights: Storage = "int8",
) -> TfliteInfo:
    """Write a quantized network as a TFLite file; a crash leaves the old file or the new one.

    Args:
        network: calibrated or trained, of static bits.
        path: the file, usually `.tflite`.
        data: samples, or what the network is called with, normalized, a few hundred of one shape; they calibrate the
            quantizers that are added.
        weights: "int8", or "int4" for layers of at most 4 bits.

    Raises:
        BitscapeError: packages of the extra "tflite" are missing, an operator that has no integer counterpart there;
            or as `integer_network`.
    """
    return write_tflite(tflite_network(network, data), path, data, weights=weights)


def tflite_network(network: nn.Module, data: Samples | Inputs) -> IntegerNetwork:
    """The integer form that TFLite files are written from: integers alone, on the grids of LiteRT's operators."""
    return fit(integer_network(network, data, integers_only=True))


def write_tflite(
    network: IntegerNetwork,
    path: str | os.PathLike[str],
    data: Samples | Inputs,
    *,
    weights: Storage = "int8",
) -> TfliteInfo:
    """As `save_tflite`, for what `tflite_network` returned; one of `data` runs, to tell shapes."""
    content = tflite_content(network, data, weights)
    write_atomic(path, content)
    containers = (NARROW_BITS, 8) if weights == "int4" else (8,)
    stored, scales = container_bytes(network, containers), scale_bytes(network)
    return TfliteInfo(
        Path(path),
        len(content),
        stored,
        scales,
        layer_containers(network, containers),
        len(network.added),
    )


def tflite_content(
    network: IntegerNetwork, data: Samples | Inputs, weights: Storage = "int8"
) -> bytes:
    """The bytes of the file. Raises BitscapeError for an operator that has no integer counterpart there."""
    if weights not in ("int8", "int4"):
        raise BitscapeError(f"weights={weights!r}: TFLite files store them as int8 or int4")
    (one,) = batches_of([first_rows(as_samples(data).parts[0].inputs, 1)], network.module)
    shapes = _Shapes(network.module)
    with torch.no_grad():
        shapes.run(*network.interface.tensors(one))
    return Writer(network, shapes.found, weights).content()


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of everything in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = tuple(value.shape)
        return value
