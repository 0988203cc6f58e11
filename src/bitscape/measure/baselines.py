"""What an exported network is compared with: the float network as a file, and the int8 file that ONNX Runtime makes of it."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, first_line
from bitscape.exporters.integer.graph import export_program, quiet
from bitscape.exporters.integer.interface import Interface, checked_samples, example_of
from bitscape.exporters.onnx.qdq import OPSETS
from bitscape.exporters.onnx.trace import checked_bytes, onnx_graph, pad_circularly, pool_globally
from bitscape.files import write_atomic
from bitscape.folders import scratch_folder
from bitscape.models.copies import copied
from bitscape.models.modes import in_eval_mode
from bitscape.quant.fold import fold_norms
from bitscape.runtimes.packages import runtime_module

_log = logging.getLogger("bitscape.exporters")
BATCH = 16
"""Calibration images that ONNX Runtime runs at once."""


def save_float_onnx(network: nn.Module, path: str | os.PathLike[str], data: Samples | Inputs) -> Path:
    """Write a float network as an ONNX file with a free batch size, its norms folded where that leaves the output as it is.

    Args:
        network: on the CPU or a GPU; it stays as it is.
        path: the file, usually `.onnx`.
        data: samples, or what the network is called with, normalized, on any device, two at least; two are traced.

    Raises:
        BitscapeError: the packages of the extra "onnx" are missing, or torch.export cannot follow the network's forward.
    """
    samples = checked_samples(data, network)
    example = example_of(samples, network)
    plain = folded(in_eval_mode(copied(network)), example)
    with quiet(), torch.no_grad():
        interface = Interface.of(plain, samples)
        program = export_program(plain, interface, example)
        model = onnx_graph(program.module(), interface, example, {}, opset=OPSETS[8][0], free_batch=True)
    import onnx_ir as ir

    for node in list(model.graph):
        pool_globally(node)
        pad_circularly(node)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.opset_imports[""], model.ir_version = OPSETS[8]
    model.producer_name, model.graph.name = "bitscape", "float network"
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # runtimes infer shapes
    write_atomic(path, checked_bytes(proto))
    return Path(path)


def folded(network: nn.Module, example: Samples | Inputs) -> nn.Module:
    """The network with its norms folded where that leaves its output as it is; itself where none can be."""
    try:
        return fold_norms(network, example)
    except BitscapeError as error:
        _log.warning("the float network keeps its norms: %s", error)
        return network


def save_onnxruntime_int8(float_onnx: str | os.PathLike[str], path: str | os.PathLike[str], images: Tensor) -> Path:
    """Quantize a float ONNX file to 8 bits by ONNX Runtime's own post-training quantization, with its defaults.

    `onnxruntime.quantization.quantize_static` behind its preparation of the graph: QuantizeLinear and DequantizeLinear around operators,
    weights int8 with a scale for each channel, activations uint8, ranges from the smallest to the largest value seen.

    Args:
        float_onnx: what `save_float_onnx` wrote, or any ONNX file with one input.
        path: the new file.
        images: normalized float32 (n, c, h, w) that set the ranges, a hundred or more.

    Raises:
        BitscapeError: the packages of the extra "onnx" are missing, or ONNX Runtime cannot quantize the file.
    """
    with _quiet_root():
        ort = runtime_module("onnxruntime.quantization")
        preparation = runtime_module("onnxruntime.quantization.shape_inference")
    with scratch_folder() as folder, _quiet_root():
        prepared, made = folder / "prepared.onnx", folder / "int8.onnx"
        try:
            preparation.quant_pre_process(os.fspath(float_onnx), prepared, skip_symbolic_shape=True)
            ort.quantize_static(
                prepared,
                made,
                _Reader(prepared, images),
                quant_format=ort.QuantFormat.QDQ,
                per_channel=True,
                weight_type=ort.QuantType.QInt8,
                activation_type=ort.QuantType.QUInt8,
            )
        except Exception as error:
            raise BitscapeError(
                f"{os.fspath(float_onnx)}: ONNX Runtime cannot quantize it ({type(error).__name__}: {first_line(error)})"
            ) from error
        write_atomic(path, made.read_bytes())
    return Path(path)


class _Reader:
    """The images in batches, as `quantize_static` wants to be given them."""

    def __init__(self, model: Path, images: Tensor) -> None:
        import onnx

        self._name = onnx.load(model).graph.input[0].name
        self._batches = iter(images.split(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.cpu().numpy()}


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Silence what onnxruntime.quantization logs, and warns of, on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
