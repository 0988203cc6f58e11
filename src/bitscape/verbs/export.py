"""bs.export: a quantized network in; a checked file out."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.engine.task import TaskName
from bitscape.errors import BitscapeError, nearest
from bitscape.exporters.agreement import Agreement, compare_outputs, require_equal, require_same
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.integer.interface import check_one_shape
from bitscape.exporters.onnx.qdq import CONTAINERS, PORTABLE, OnnxInfo, write_onnx
from bitscape.exporters.onnx.qonnx import save_qonnx
from bitscape.exporters.openvino.ir import OpenvinoInfo, refuse_wide, write_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.exporters.parity import ALLOWED, IMAGES_AT_ONCE, PARITY_IMAGES, ParityReport, check_parity
from bitscape.exporters.tflite.file import TfliteInfo, tflite_network, write_tflite
from bitscape.exporters.tflite.operators import Storage
from bitscape.exporters.tflite.parity import check_tflite_parity
from bitscape.folders import replaced_if_good
from bitscape.models.copies import copied
from bitscape.models.modes import in_eval_mode
from bitscape.policy import WIDE_BITS, Policy
from bitscape.quant.layers import quantized_layers, require_quantized
from bitscape.runtimes.litert import LiteRt
from bitscape.runtimes.sessions import OnnxRuntime, OpenVino, Session
from bitscape.signatures import checked
from bitscape.verbs.proxy import HELD_OUT, parted, proxy_of

Form = Literal["packed", "onnx", "openvino", "qonnx", "tflite"]
SUFFIXES: dict[str, Form] = {
    ".safetensors": "packed",
    ".qonnx.onnx": "qonnx",
    ".onnx": "onnx",
    ".xml": "openvino",
    ".tflite": "tflite",
}
"""End of a file's name -> its form; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how a runtime computes it."""

    path: Path
    """The file; an OpenVINO file has its weights in a .bin beside it."""
    file_bytes: int
    """Of all of it."""
    info: Any = field(repr=False)
    """What the file holds: a PackedInfo, OnnxInfo, OpenvinoInfo, QonnxInfo or TfliteInfo."""
    runtime: str | None = None
    """Name and version of the runtime that ran the file; None for packed and QONNX files."""
    parity: ParityReport | None = None
    """Every layer's codes against exact integers."""
    exact: Mapping[str, Agreement] = field(default_factory=dict)
    """Name of each output -> how far it agrees with exact integers: relative error, and classes where it is logits."""
    simulated: Mapping[str, Agreement] = field(default_factory=dict)
    """Name of each output -> how far it agrees with the network before the export, on the same samples."""
    compared: int = 0
    """Samples on which outputs were compared; of a packed file, on which it gives the same bits when it is read back."""


@checked
def export(
    network: nn.Module,
    path: str | os.PathLike[str],
    data: Any = None,
    *,
    form: Form | None = None,
    held_out: Any = None,
    task: TaskName | Literal["auto"] = "auto",
    int2: bool = True,
    weights: Storage = "int8",
    policy: Policy | None = None,
    float_model: nn.Module | None = None,
    count: int = 256,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> ExportReport:
    """Write a quantized network as a file, and check the file. A file that fails is not kept.

    A .safetensors file holds packed weights. An .onnx file is for ONNX Runtime, an .xml file for OpenVINO, a .tflite file for
    LiteRT and the compilers of NPUs: every layer is compared with exact integers, and every output with the network before
    the export. A .qonnx.onnx file is for FINN and hls4ml. Inputs keep the names of the forward's arguments, outputs those
    under which the network returns them.

    Args:
        network: what `quantize` returned, perhaps trained since; it is not changed.
        path: where the file goes: .safetensors, .onnx, .xml, .tflite or .qonnx.onnx.
        data: samples of one shape, which set the ranges of tensors between the layers, and on which the file is compared;
            see `search`. A packed file needs none.
        form: "packed", "onnx", "openvino", "qonnx" or "tflite"; None = by the end of the path.
        held_out: samples that set no range, on which outputs are compared; None = every fourth of `data`.
        task: what the outputs are: "classes" compares classes of every output (n, k), "follow" and "binary" of none,
            "auto" where one output alone is (n, k).
        int2: whether an .onnx file may store weights in 2 bits, which ONNX Runtime alone reads.
        weights: of a .tflite file: "int8", or "int4" for layers of at most 4 bits.
        policy: what the network was quantized by, for a packed file to keep with its cost and provenance.
        float_model: the network that was quantized; with it and `data`, a packed file is read
            back and compared.
        count: most samples that are used, of `data` and of `held_out`.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        seed: of the samples drawn.

    Raises:
        BitscapeError: a network that is not quantized, an unknown suffix, a folder that is not there, no data where a
            runtime needs them, samples of several shapes, operators that cannot be written, or a file that its runtime
            computes otherwise than integers say.
    """
    path = Path(path)
    choices = (("form", form, get_args(Form)), ("task", task, (*get_args(TaskName), "auto")), ("weights", weights, get_args(Storage)))
    for name, value, allowed in choices:
        if value is not None and value not in allowed:
            raise BitscapeError(f"{name}={value!r}: unknown{nearest(str(value), allowed)}; use one of {', '.join(allowed)}")
    require_quantized(network, "network")
    _check_folder(path)
    form = check_path(path) if form is None else form
    if form == "openvino":
        layers = quantized_layers(network).items()
        refuse_wide(name for name, layer in layers if getattr(layer.input_quantizer, "bits", None) == WIDE_BITS)
    if data is None and form != "packed":
        raise BitscapeError(f"data is missing: samples set ranges in {path.suffix} files, and check them; pass some of the training data")
    read = [None if part is None else proxy_of(network, part, count=count, inputs=inputs, seed=seed) for part in (data, held_out)]
    if form == "packed":
        return _packed(network, path, policy, float_model, read[0])
    samples, compared = (None if part is None else part.to(torch.device("cpu")) for part in read)
    assert samples is not None
    on_cpu = in_eval_mode(copied(network).cpu())
    if form == "qonnx":
        return _qonnx(on_cpu, path, samples)
    ranges = samples
    if compared is None:  # of few samples all set ranges and are compared on
        ranges, compared = (samples, samples) if len(samples) < HELD_OUT else parted(samples)
    check_one_shape(ranges, compared)
    classes = None if task == "auto" else task == "classes"
    if form == "tflite":
        return _tflite(_Comparison(on_cpu, tflite_network(on_cpu, ranges), compared, classes), path, ranges, weights)
    comparison = _Comparison(on_cpu, integer_network(on_cpu, ranges), compared, classes)
    if form == "openvino":
        return _openvino(comparison, path, ranges)
    return _onnx(comparison, path, ranges, CONTAINERS if int2 else PORTABLE)


def check_path(path: Path, also: str | None = None) -> Form | None:
    """Return the form of a file by the end of its name; None for the suffix `also`, which is no form.

    Raises BitscapeError for an unknown suffix, and for a folder that is not there.
    """
    _check_folder(path)
    for suffix, form in SUFFIXES.items():
        if path.name.endswith(suffix):
            return form
    if also is not None and path.suffix == also:
        return None
    more = "" if also is None else f", or {also} (the policy)"
    raise BitscapeError(
        f"path {str(path)!r}: unknown suffix; use .safetensors (packed), .onnx, .xml (OpenVINO), .tflite (LiteRT), "
        f".qonnx.onnx (QONNX){more}"
    )


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise BitscapeError(f"path {str(path)!r}: there is no folder {path.parent}; create it")


@dataclass(frozen=True)
class _Comparison:
    """What a file is compared with, and on which samples."""

    network: nn.Module
    integers: IntegerNetwork
    samples: Samples
    classes: bool | None

    @property
    def feeds(self) -> Any:
        """The few samples on which every layer is compared, as a file takes them."""
        return self.integers.interface.feeds(self.samples.first(PARITY_IMAGES), IMAGES_AT_ONCE)

    def report(
        self, path: Path, info: OnnxInfo | OpenvinoInfo | TfliteInfo, session: Session, runtime: str, parity: ParityReport
    ) -> ExportReport:
        """Compare outputs. Raises BitscapeError where they are further from exact integers than roundings explain."""
        exact, simulated = compare_outputs(self.integers, self.network, session, self.samples, classes=self.classes)
        require_same(exact, runtime)
        return ExportReport(
            path=path,
            file_bytes=info.file_bytes,
            info=replace(info, path=path),
            runtime=runtime,
            parity=parity,
            exact=exact,
            simulated=simulated,
            compared=len(self.samples),
        )


def _onnx(comparison: _Comparison, path: Path, ranges: Samples, containers: tuple[int, ...]) -> ExportReport:
    runtime = OnnxRuntime()
    with replaced_if_good(path) as draft:
        info = write_onnx(comparison.integers, draft, ranges, containers=containers)
        parity = check_parity(draft, comparison.feeds, runtime)
        parity.require(ALLOWED["onnxruntime"])
        return comparison.report(path, info, runtime.open(draft), runtime.version, parity)


def _openvino(comparison: _Comparison, path: Path, ranges: Samples) -> ExportReport:
    runtime = OpenVino()
    with replaced_if_good(path, path.with_suffix(".bin")) as draft:
        info = write_openvino(comparison.integers, draft, ranges)
        parity = check_openvino_parity(draft, info.source, comparison.feeds, runtime)
        parity.require(ALLOWED["openvino"])
        return comparison.report(path, info, runtime.open(draft), runtime.version, parity)


def _tflite(comparison: _Comparison, path: Path, ranges: Samples, weights: Storage) -> ExportReport:
    runtime = LiteRt()
    with replaced_if_good(path) as draft:
        info = write_tflite(comparison.integers, draft, ranges, weights=weights)
        parity = check_tflite_parity(draft, comparison.feeds, runtime)
        parity.require(ALLOWED["litert"])
        return comparison.report(path, info, runtime.open(draft), runtime.version, parity)


def _qonnx(network: nn.Module, path: Path, samples: Samples) -> ExportReport:
    info = save_qonnx(network, path, samples)
    return ExportReport(path=path, file_bytes=info.file_bytes, info=info)


def _packed(
    network: nn.Module, path: Path, policy: Policy | None, float_model: nn.Module | None, samples: Samples | None
) -> ExportReport:
    compared = 0
    with replaced_if_good(path) as draft:
        info = save_packed(network, draft, policy=policy)
        if float_model is not None and samples is not None:
            require_equal(network, load_packed(draft, float_model), samples, path)
            compared = len(samples)
    return ExportReport(path=path, file_bytes=info.file_bytes, info=replace(info, path=path), compared=compared)
