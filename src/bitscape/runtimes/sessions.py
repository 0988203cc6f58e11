"""Files in real runtimes: opened, run, asked what they compute in float, and timed beside one another.

On CPUs, on purpose: integer kernels of ONNX Runtime and OpenVINO are what the exported files are written for.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError, needs_extra
from bitscape.folders import scratch_folder
from bitscape.runtimes.packages import runtime_module

Array = NDArray[Any]
Feed: TypeAlias = Array | Mapping[str, Array]
"""Arrays by the names of a file's inputs; or the one array of a file that takes one."""
_FLOAT_KERNELS = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_FLOAT_PRECISIONS = ("f32", "f16", "bf16")
PRODUCT, BEHIND = "/WithoutBiases", "/behind"
"""After a layer's name, in an OpenVINO file: its product where a bias is added behind it; with a number, what follows up to a quantizer."""
_NODE_PART = re.compile(rf"(?:{PRODUCT}|{BEHIND}[0-9]+)(?=/|$)")


class Session(Protocol):
    """A file that a runtime has loaded."""

    inputs: tuple[str, ...]
    """Names of the inputs."""
    outputs: tuple[str, ...]
    """Names of the outputs."""

    def run(self, inputs: Feed) -> list[Array]:
        """The outputs, in the order of their names, for inputs by name, or for the one input of a file that has no other."""
        ...

    def float_layers(self) -> list[str]:
        """Convolutions and products with weights that the runtime computes in float, by its own account."""
        ...


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    threads: int = 1
    """Threads inside an operator."""

    @property
    def version(self) -> str:
        """Name and version."""
        return f"onnxruntime {runtime_module('onnxruntime').__version__}"

    def open(self, model: str | os.PathLike[str] | bytes) -> "OnnxSession":
        """Load an .onnx file, or its content. Raises BitscapeError if the runtime refuses it."""
        return OnnxSession(model, self.threads)


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """OpenVINO on the CPU, what is not integer in float32."""

    threads: int = 1
    """Threads inside an operator."""

    @property
    def version(self) -> str:
        """Name and version."""
        return f"openvino {runtime_module('openvino').__version__.partition('-')[0]}"

    def open(self, model: str | os.PathLike[str] | bytes) -> "OpenVinoSession":
        """Load an .xml or .onnx file, or the content of the latter. Raises BitscapeError if the runtime refuses it."""
        return OpenVinoSession(model, self.threads)


Runtime = OnnxRuntime | OpenVino
RUNTIMES: dict[str, type[Runtime]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


class OnnxSession:
    """A file in ONNX Runtime."""

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int) -> None:
        options = runtime_module("onnxruntime").SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self._model, self._options = model, options
        self._session = self._opened()
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, inputs: Feed) -> list[Array]:
        return list(self._session.run(None, by_name(inputs, self.inputs)))

    def _opened(self) -> Any:
        source = self._model if isinstance(self._model, bytes) else os.fspath(self._model)
        try:
            return runtime_module("onnxruntime").InferenceSession(source, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise refused("ONNX Runtime", self._model, error) from error

    def _fused(self) -> Any:
        """The graph once operators are fused, before the last step: that changes layouts only, and names."""
        with needs_extra("onnx"):
            import onnx
        level, levels = self._options.graph_optimization_level, runtime_module("onnxruntime").GraphOptimizationLevel
        with scratch_folder() as folder:
            path = folder / "fused.onnx"
            self._options.graph_optimization_level, self._options.optimized_model_filepath = levels.ORT_ENABLE_EXTENDED, str(path)
            try:
                self._opened()
            finally:
                self._options.graph_optimization_level, self._options.optimized_model_filepath = level, ""
            return onnx.load_from_string(path.read_bytes()).graph

    def float_layers(self) -> list[str]:
        graph = self._fused()
        made_by = {name: node for node in graph.node for name in node.output}

        def is_weight(name: str) -> bool:
            maker = made_by.get(name)
            return maker is None or (maker.op_type in ("DequantizeLinear", "Cast", "Transpose") and is_weight(maker.input[0]))

        kernels = (node for node in graph.node if node.op_type in _FLOAT_KERNELS)
        # A layer that is one operator with the rectifier behind it has a name made of its own.
        return [(node.name or node.output[0]).removeprefix("fused ") for node in kernels if is_weight(node.input[1])]


class OpenVinoSession:
    """A file in OpenVINO."""

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int) -> None:
        openvino = runtime_module("openvino")
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            source = core.read_model(model if isinstance(model, bytes) else os.fspath(model))
            self._compiled = core.compile_model(source, "CPU", settings)
        except Exception as error:
            raise refused("OpenVINO", model, error) from error
        self._request = self._compiled.create_infer_request()
        self.inputs = _names(self._compiled.inputs, "input")
        self.outputs = _names(self._compiled.outputs, "output")

    def run(self, inputs: Feed) -> list[Array]:
        arrays = by_name(inputs, self.inputs)
        results = self._request.infer([arrays[name] for name in self.inputs])
        return [np.array(results[output]) for output in self._compiled.outputs]

    def float_layers(self) -> list[str]:
        found = []
        for node in self._compiled.get_runtime_model().get_ops():
            information = node.get_rt_info()
            kind, precision = (information[key].astype(str) for key in ("layerType", "runtimePrecision"))
            if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul") and precision in _FLOAT_PRECISIONS:
                parts = information["originalLayersNames"].astype(str).split(",")  # the node's own name may be new
                name = next((part for part in parts if _NODE_PART.search(part)), node.get_friendly_name())
                found.append(layer_of_node(name))
        return found


def layer_of_node(name: str) -> str:
    """The layer's part of a node's name in an OpenVINO file; layers may have slashes in theirs."""
    return _NODE_PART.split(name)[0]


def _names(ports: Sequence[Any], kind: str) -> tuple[str, ...]:
    return tuple(port.get_any_name() if port.get_names() else f"{kind}{index}" for index, port in enumerate(ports))


def by_name(inputs: Feed, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of a file's inputs. Raises BitscapeError for other names than the file has."""
    if not isinstance(inputs, Mapping):
        if len(names) != 1:
            raise BitscapeError(f"inputs: one array, and the file takes {', '.join(names) or 'none'}; give arrays by these names")
        return {names[0]: inputs}
    if inputs.keys() != set(names):
        raise BitscapeError(f"inputs: {', '.join(inputs)}; the file takes {', '.join(names)}: give arrays by these names")
    return dict(inputs)


def refused(runtime: str, model: str | os.PathLike[str] | bytes, error: Exception) -> BitscapeError:
    """The error for a model that a runtime does not load, with the runtime's own reason."""
    name = "the model" if isinstance(model, bytes) else os.fspath(model)
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(("Exception from", "Check "))]
    return BitscapeError(f"{name}: {runtime} does not load it: {'; '.join(lines)[:400] or type(error).__name__}")


@dataclass(frozen=True)
class Timing:
    """How long one run takes, the median over rounds of the median in a round."""

    cpu_ms: float
    """Process CPU time, milliseconds: steady on a busy machine."""
    wall_ms: float
    """Wall-clock time, milliseconds."""
    spread: float
    """Standard deviation of the rounds' CPU times over their median."""

    def ms(self, threads: int) -> float:
        """What runs are compared by: CPU time of one thread, wall-clock time of several."""
        return self.cpu_ms if threads == 1 else self.wall_ms


def time_alternately(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 7, round_s: float = 0.2, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Timing]:
    """Time several runs beside one another: every round visits each of them, so that a change of the machine's speed meets all.

    Args:
        runs: name -> what is timed.
        rounds: visits of each.
        round_s: about how long a visit lasts, seconds; three runs at least.
        progress: called with the number of rounds done.
    """
    counts = {}
    for name, run in runs.items():
        run()  # what is done once: memory, prepacked weights
        start = time.perf_counter()
        run()
        counts[name] = max(3, int(round_s / max(1e-6, time.perf_counter() - start)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for done in range(rounds):
        for name, run in runs.items():
            times[name].append(_median_times(run, counts[name]))
        progress(done + 1)
    return {name: _timing(measured) for name, measured in times.items()}


def _median_times(run: Callable[[], object], count: int) -> tuple[float, float]:
    cpu, wall = [], []
    for _ in range(count):
        start = time.process_time(), time.perf_counter()
        run()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return median(cpu), median(wall)


def _timing(rounds: Sequence[tuple[float, float]]) -> Timing:
    cpu, wall = (np.array(values) * 1000 for values in zip(*rounds, strict=True))
    return Timing(float(np.median(cpu)), float(np.median(wall)), float(cpu.std() / max(1e-9, float(np.median(cpu)))))
