"""A TFLite file in the making: tensors, constants and operators, and the bytes that they become."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.runtimes.packages import runtime_module

Array = NDArray[Any]
IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
KINDS = {"float32": "FLOAT32", "int32": "INT32", "int64": "INT64", "int16": "INT16", "int8": "INT8"}
"""NumPy's types -> the schema's."""
VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "TRANSPOSE_CONV": 3,
    "FULLY_CONNECTED": 5,
    "QUANTIZE": 2,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "MIRROR_PAD": 2,
    "RESHAPE": 1,
    "HARD_SWISH": 1,
    "GELU": 2,
}
"""Operator -> its version of int8; 2 for all others."""
WORD_VERSIONS = {
    "CONV_2D": 4,
    "DEPTHWISE_CONV_2D": 5,
    "TRANSPOSE_CONV": 3,
    "FULLY_CONNECTED": 7,
    "RESHAPE": 1,
    "HARD_SWISH": 1,
}
"""Of int16; 3 for all others."""
INT4_VERSIONS = {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 7, "FULLY_CONNECTED": 10}
"""Of int4 weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization:
    """real = scale * (q - zero point), one scale for each index of a dimension, or one for all."""

    scale: Array
    """float32 (n,)."""
    zero_point: int = 0
    axis: int = 0


class Builder:
    """Collects tensors and operators, and writes the file."""

    def __init__(self) -> None:
        self.schema = runtime_module("ai_edge_litert.schema_py_generated")
        self.tensors: list[Any] = []
        self._buffers: list[Any] = [self.schema.BufferT()]
        self._known: dict[bytes, int] = {}
        self._constants: dict[tuple[Any, ...], int] = {}
        self._codes: dict[tuple[str, int], int] = {}
        self._operators: list[Any] = []

    def tensor(
        self, name: str, shape: Sequence[int], kind: str, quantization: Quantization | None = None
    ) -> int:
        """Add a tensor; `kind` is the schema's name of a type."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = (
            name,
            list(shape),
            getattr(self.schema.TensorType, kind),
            0,
        )
        if quantization is not None:
            parameters = self.schema.QuantizationParametersT()
            parameters.scale = np.asarray(quantization.scale, np.float32)
            parameters.zeroPoint = np.full(len(parameters.scale), quantization.zero_point, np.int64)
            parameters.quantizedDimension = quantization.axis
            tensor.quantization = parameters
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(
        self,
        name: str,
        values: Array,
        quantization: Quantization | None = None,
        *,
        kind: str | None = None,
    ) -> int:
        """Add a tensor of these values; the bytes of equal ones stand in the file once. Of "INT4" two stand in a byte."""
        kind = kind or KINDS[str(values.dtype)]
        content = pack_nibbles(values) if kind == "INT4" else np.ascontiguousarray(values).tobytes()
        if content not in self._known:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(content, np.uint8)
            self._buffers.append(buffer)
            self._known[content] = len(self._buffers) - 1
        key = (kind, values.shape, self._known[content])
        if quantization is None and key in self._constants:
            return self._constants[key]
        index = self.tensor(name, values.shape, kind, quantization)
        self.tensors[index].buffer = self._known[content]
        if quantization is None:
            self._constants[key] = index
        return index

    def operator(
        self,
        code: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str | None = None,
        **settings: Any,
    ) -> None:
        """Add an operator; `options` names its table of settings in the schema, without "Options"."""
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault(
            (code, self._version(code, inputs)), len(self._codes)
        )
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        if options is not None:
            operator.builtinOptions = getattr(self.schema, f"{options}OptionsT")()
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{options}Options")
            for name, value in settings.items():
                assert hasattr(operator.builtinOptions, name), (options, name)
                setattr(operator.builtinOptions, name, value)
        self._operators.append(operator)

    def _version(self, code: str, inputs: Sequence[int]) -> int:
        kinds = {self.tensors[index].type for index in inputs if index >= 0}
        types = self.schema.TensorType
        if types.INT4 in kinds and code in INT4_VERSIONS:
            return INT4_VERSIONS[code]
        return WORD_VERSIONS.get(code, 3) if types.INT16 in kinds else VERSIONS.get(code, 2)

    def content(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        schema = self.schema
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = (
            self.tensors,
            self._operators,
            list(inputs),
            list(outputs),
        )
        graph.name = "main"
        model.version, model.description, model.subgraphs, model.buffers = (
            SCHEMA_VERSION,
            "bitscape",
            [graph],
            self._buffers,
        )
        model.operatorCodes = []
        for code, version in self._codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode = getattr(schema.BuiltinOperator, code)
            # Readers of before 2020 know this entry alone, which ends at 127.
            entry.deprecatedBuiltinCode, entry.version = min(entry.builtinCode, 127), version
            model.operatorCodes.append(entry)
        return packed(model)


def packed(model: Any) -> bytes:
    """The bytes of a ModelT."""
    flatbuffers = runtime_module("flatbuffers")
    writer = flatbuffers.Builder(1024)
    writer.Finish(model.Pack(writer), IDENTIFIER)
    return bytes(writer.Output())


def unpacked(content: bytes) -> Any:
    """The ModelT of a file's bytes."""
    return runtime_module("ai_edge_litert.schema_py_generated").ModelT.InitFromPackedBuf(content, 0)


def names_of(enumeration: str) -> dict[int, str]:
    """Value -> name in an enumeration of the schema."""
    schema = runtime_module("ai_edge_litert.schema_py_generated")
    return {
        value: name for name, value in vars(getattr(schema, enumeration)).items() if name.isupper()
    }


def pack_nibbles(codes: Array) -> bytes:
    """Two codes of -8 to 7 a byte, the first in the low bits."""
    flat = codes.reshape(-1).astype(np.int8).view(np.uint8) & 15
    flat = np.pad(flat, (0, len(flat) % 2)).reshape(-1, 2)
    return bytes((flat[:, 0] | flat[:, 1] << 4).astype(np.uint8).tobytes())


def unpack_nibbles(content: Array, count: int) -> Array:
    """The codes of `pack_nibbles`, int8 (count,)."""
    both = np.stack([content & 15, content >> 4], 1).reshape(-1)[:count].astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(np.int8)


def one_operator(content: bytes, index: int) -> bytes:
    """A file of one operator of another file, with the constants that it takes."""
    model = unpacked(content)
    (graph,) = model.subgraphs
    operator = graph.operators[index]
    used = [tensor for tensor in (*operator.inputs, *operator.outputs) if tensor >= 0]
    places = {tensor: at for at, tensor in enumerate(dict.fromkeys(used))}
    stored = {tensor: graph.tensors[tensor].buffer for tensor in places}
    operator.inputs = [places.get(tensor, -1) for tensor in operator.inputs]
    operator.outputs = [places[tensor] for tensor in operator.outputs]
    graph.inputs = [places[tensor] for tensor in places if not stored[tensor] and places[tensor] not in operator.outputs]
    graph.outputs, graph.operators = operator.outputs, [operator]
    graph.tensors = [graph.tensors[tensor] for tensor in places]
    model.buffers = [model.buffers[0], *(model.buffers[buffer] for buffer in stored.values() if buffer)]
    for tensor, place in zip(graph.tensors, _places([bool(buffer) for buffer in stored.values()]), strict=True):
        tensor.buffer = place
    return packed(model)


def _places(stored: Sequence[bool]) -> list[int]:
    """Numbers of the buffers of tensors that have one, from 1 on; 0 of the others."""
    return [number * is_stored for number, is_stored in zip(accumulate(stored), stored, strict=True)]


def operator_weights(content: bytes) -> list[str]:
    """For each operator of a file the name of its weight, one that `Writer` stored; "" where it has none."""
    graph = unpacked(content).subgraphs[0]
    return [_weight_name(graph, operator) for operator in graph.operators]


def _weight_name(graph: Any, operator: Any) -> str:
    names = (graph.tensors[index].name.decode() for index in operator.inputs if index >= 0 and graph.tensors[index].buffer)
    return next((name for name in names if name.rpartition(".")[2] == "weight"), "")
