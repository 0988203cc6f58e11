"""bs.export: a quantized network in; a checked file out."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.exporters.agreement import Agreement, compare_outputs, require_same
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.onnx.qdq import CONTAINERS, write_onnx
from bitscape.exporters.openvino.ir import write_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.packed.file import save_packed
from bitscape.exporters.parity import ALLOWED, PARITY_IMAGES, ParityReport, check_parity
from bitscape.folders import replaced_if_good
from bitscape.models.copies import copied
from bitscape.models.modes import in_eval_mode
from bitscape.quant.layers import quantized_layers
from bitscape.runtimes.sessions import OnnxRuntime, OpenVino
from bitscape.verbs.proxy import proxy_of

HELD_OUT = 4
"""One in so many samples sets no range: on those whole networks are compared."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how a runtime computes it."""

    path: Path
    """The file; an OpenVINO file has its weights in a .bin beside it."""
    file_bytes: int
    """Of all of it."""
    runtime: str | None = None
    """Name and version of the runtime that ran the file; None for a packed file."""
    parity: ParityReport | None = None
    """Every layer's codes against exact integers."""
    exact: Mapping[str, Agreement] = field(default_factory=dict)
    """Name of each output -> how far it agrees with exact integers, on samples that set no range."""
    simulated: Mapping[str, Agreement] = field(default_factory=dict)
    """Name of each output -> how far it agrees with the network before the export, on the same samples."""


def export(
    network: nn.Module,
    path: str | os.PathLike[str],
    data: Any = None,
    *,
    count: int = 256,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> ExportReport:
    """Write a quantized network as a file, and check the file. A file that fails is not kept.

    A .safetensors file holds packed weights. An .onnx file is for ONNX Runtime, an .xml file for OpenVINO: every layer is
    compared with exact integers, and every output with the network before the export.

    Args:
        network: what `quantize` returned, perhaps trained since; it is not changed.
        path: where the file goes: .safetensors, .onnx or .xml.
        data: samples that set the ranges of tensors between the layers, and on which the file is compared; see `search`.
            A packed file needs none.
        count: most samples that are used; every fourth one sets no range.
        inputs: from a batch to the one tensor that the network is called with; see `BatchReader`.
        seed: of the samples drawn.

    Raises:
        BitscapeError: a network that is not quantized, an unknown suffix, no data where a runtime needs them, operators
            that cannot be written, or a file that its runtime computes otherwise than integers say.
    """
    path = Path(path)
    if not quantized_layers(network):
        raise BitscapeError("network: it has no quantized layer; call bitscape.quantize(model, policy, data) first")
    if path.suffix == ".safetensors":
        return ExportReport(path=path, file_bytes=save_packed(network, path).file_bytes)
    if path.suffix not in _WRITERS:
        raise BitscapeError(f"path {str(path)!r}: unknown suffix; use .safetensors (packed), .onnx or .xml (OpenVINO)")
    if data is None:
        raise BitscapeError(f"data is missing: samples set ranges in {path.suffix} files, and check them; pass some of the training data")
    images, _ = proxy_of(network, data, count=count, inputs=inputs, seed=seed)
    ranges, compared = _parted(images.cpu())
    on_cpu = in_eval_mode(copied(network).cpu())
    return _WRITERS[path.suffix](on_cpu, integer_network(on_cpu, ranges), path, ranges, compared)


def _parted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Part the samples that set ranges from those that files are compared on; the same ones where there are too few."""
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    return (images[~held_out], images[held_out]) if bool(held_out.any()) else (images, images)


def _onnx(network: nn.Module, integers: IntegerNetwork, path: Path, ranges: Tensor, compared: Tensor) -> ExportReport:
    runtime = OnnxRuntime()
    with replaced_if_good(path) as draft:
        file_bytes = write_onnx(integers, draft, ranges, containers=CONTAINERS).file_bytes
        parity = check_parity(draft, compared[:PARITY_IMAGES].numpy(), runtime)
        parity.require(ALLOWED["onnxruntime"])
        exact, simulated = compare_outputs(integers, network, runtime.open(draft), compared)
        require_same(exact, runtime.version)
    return ExportReport(
        path=path, file_bytes=file_bytes, runtime=runtime.version, parity=parity, exact=exact, simulated=simulated
    )


def _openvino(network: nn.Module, integers: IntegerNetwork, path: Path, ranges: Tensor, compared: Tensor) -> ExportReport:
    runtime = OpenVino()
    with replaced_if_good(path, path.with_suffix(".bin")) as draft:
        info = write_openvino(integers, draft, ranges)
        parity = check_openvino_parity(draft, info.source, compared[:PARITY_IMAGES], runtime)
        parity.require(ALLOWED["openvino"])
        exact, simulated = compare_outputs(integers, network, runtime.open(draft), compared)
        require_same(exact, runtime.version)
    return ExportReport(
        path=path, file_bytes=info.file_bytes, runtime=runtime.version, parity=parity, exact=exact, simulated=simulated
    )


class _Writer(Protocol):
    def __call__(
        self, network: nn.Module, integers: IntegerNetwork, path: Path, ranges: Tensor, compared: Tensor
    ) -> ExportReport: ...


_WRITERS: dict[str, _Writer] = {".onnx": _onnx, ".xml": _openvino}
