"""Does LiteRT compute a TFLite file as integers say it must? Every layer against exact integers, as `exporters.parity` does for ONNX.

LiteRT has two arithmetics, and each layer must follow one of them in every code:

    XNNPACK's kernels    of int8 weights, and linear layers: sums times one float32 multiplier, rounded once, half to even
    its own kernels      convolutions of int4 weights or int16 activations: in fixed point. A sum times 31 bits of the multiplier is
                         rounded to a whole number, and that, divided by a power of two, again; or a sum of 64 bits times 16 bits of
                         the multiplier once. So a code may be the one beside.

The second is that of TensorFlow Lite's kernels (MultiplyByQuantizedMultiplier, tflite/kernels/internal/common.cc), halves rounded up
as ruy's do on x86.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import BYTE, WORD, ActivationGrid, layer_of
from bitscape.exporters.parity import FileLayer, ParityReport, compare_layers
from bitscape.exporters.tflite.flatbuffer import names_of, packed, unpack_nibbles, unpacked
from bitscape.exporters.tflite.operators import NONE, VALID, Windows, fused_limits
from bitscape.runtimes.litert import LiteRt, channels_second
from bitscape.runtimes.sessions import Feed

Array = NDArray[Any]
FRACTION = 31
"""Bits of a multiplier in fixed point, between one half and one."""


def check_tflite_parity(
    path: str | os.PathLike[str], inputs: Iterable[Feed], runtime: LiteRt | None = None
) -> ParityReport:
    """Run a TFLite file on images and compare every layer with the reference.

    Args:
        path: what `save_tflite` wrote.
        inputs: batches of a few samples by input name, `Interface.feeds`.
        runtime: LiteRT with one thread by default.

    Raises:
        BitscapeError: packages of the extra "tflite" are missing, or LiteRT refuses the file.
    """
    runtime = runtime or LiteRt()
    file = _File(Path(path).read_bytes())
    layers = list(file.layers())
    if not layers:
        raise BitscapeError(
            f"{os.fspath(path)}: it has no layer of integer weights; give a file of `bitscape export tflite`"
        )
    tensors = {int(name) for layer in layers for name in (layer.input, layer.output)}
    session, batches = runtime.open(file.with_outputs(tensors)), list(inputs)

    def run(batch: Feed) -> dict[str, Array]:
        return {
            str(index): channels_second(codes)
            for index, codes in session.codes(batch, tensors).items()
        }

    once = compare_layers(runtime.version, layers, batches, run, ())
    otherwise = {result.name for result in once.layers if result.differing}
    in_fixed_point = [FixedPointLayer.of(layer) for layer in layers if layer.name in otherwise]
    found = (
        compare_layers(runtime.version, in_fixed_point, batches, run, ())
        if in_fixed_point
        else once
    )
    explained = {
        result.name: result
        for result in found.layers
        if not result.differing and result.name in otherwise
    }
    return replace(
        once,
        layers=tuple(explained.get(result.name, result) for result in once.layers),
        fixed_point=tuple(result for result in once.layers if result.name in explained),
    )


class FixedPointLayer(FileLayer):
    """A layer whose kernel multiplies in fixed point."""

    @classmethod
    def of(cls, layer: FileLayer) -> "FixedPointLayer":
        """The same layer."""
        return cls(**{field.name: getattr(layer, field.name) for field in fields(layer)})

    def _output_codes(self, products: Array, bias: Array, spacing: Array) -> Array:
        assert self.output_scale is not None
        scales = float(self.input_scale) * self.weight_scale.astype(np.float64)
        multiplier = self._by_channel(scales / float(self.output_scale))
        codes = (
            multiplied(products + bias, multiplier, wide=self.input_kind.itemsize > 1)
            + self.output_zero_point
        )
        return np.asarray(np.clip(codes, self.low, self.high))


def multiplied(sums: Array, multiplier: Array, *, wide: bool) -> Array:
    """Whole sums times a multiplier in fixed point, rounded to int64.

    Args:
        sums: int64.
        multiplier: float64, positive, to broadcast against them.
        wide: sums of 64 bits, behind int16 activations.
    """
    mantissa, exponent = np.frexp(multiplier)
    fixed, exponent = (
        np.floor(mantissa * 2.0**FRACTION + 0.5).astype(np.int64),
        exponent.astype(np.int64),
    )
    full = fixed == 1 << FRACTION
    fixed, exponent = np.where(full, fixed >> 1, fixed), exponent + full
    if wide:
        short = np.minimum((fixed + (1 << 15)) >> 16, (1 << 15) - 1)
        return _halved(sums * short, 15 - exponent)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    high = _halved((sums << left) * fixed, np.array(FRACTION))
    return _halved(high, right)


def _halved(values: Array, times: Array) -> Array:
    """Whole numbers divided by two so many times, halves rounded up."""
    return np.asarray((values + ((np.int64(1) << times) >> 1)) >> times)


class _File:
    """A TFLite file that is read."""

    def __init__(self, content: bytes) -> None:
        self.model = unpacked(content)
        (self.graph,) = self.model.subgraphs
        self.operators, self.types = names_of("BuiltinOperator"), names_of("TensorType")

    def with_outputs(self, tensors: Collection[int]) -> bytes:
        """The file with these tensors among its outputs."""
        own = [*self.graph.outputs]
        self.graph.outputs = [
            *own,
            *(index for index in sorted(tensors) if index not in (*own, *self.graph.inputs)),
        ]
        content = packed(self.model)
        self.graph.outputs = own
        return content

    def layers(self) -> Iterator[FileLayer]:
        """The layers in order."""
        for operator in self.graph.operators:
            code = self.operators[self.model.operatorCodes[operator.opcodeIndex].builtinCode]
            if code == "TRANSPOSE_CONV":
                _, weight, x, bias = operator.inputs
                yield self._layer("ConvTranspose", code, operator, x, weight, bias)
            elif code in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
                yield self._layer(
                    "Gemm" if code == "FULLY_CONNECTED" else "Conv",
                    code,
                    operator,
                    *operator.inputs,
                )

    def _layer(
        self, kind: str, code: str, operator: Any, x: int, weight: int, bias: int
    ) -> FileLayer:
        (output,), options = operator.outputs, operator.builtinOptions
        codes = self._constant(weight)
        if codes.ndim == 4:
            codes = codes.transpose((3, 0, 1, 2) if code.startswith("DEPTHWISE") else (0, 3, 1, 2))
        given, made = self._grid(x), self._grid(output)
        low, high = (
            (made.qmin, made.qmax)
            if options.fusedActivationFunction == NONE
            else fused_limits(options.fusedActivationFunction, made)
        )
        name = layer_of(self.graph.tensors[weight].name.decode())
        middle = ((WORD if made.is_wide else BYTE) + 1) // 2
        return FileLayer(
            name=name,
            operator=kind,
            settings={} if kind == "Gemm" else self._settings(kind, options, x, output, codes),
            input=str(x),
            input_scale=np.float32(given.scale),
            input_zero_point=self._zero_point(x),
            input_kind=np.dtype(np.int16 if given.is_wide else np.int8),
            weight=codes,
            weight_scale=np.asarray(self.graph.tensors[weight].quantization.scale, np.float32),
            bias=self._constant(bias).astype(np.int64),
            float_bias=False,
            output=str(output),
            output_scale=np.float32(made.scale),
            becomes_output=False,
            output_zero_point=self._zero_point(output),
            output_kind=np.dtype(np.int16 if made.is_wide else np.int8),
            low=low - middle,
            high=high - middle,
        )

    def _settings(
        self, kind: str, options: Any, x: int, output: int, codes: Array
    ) -> dict[str, Any]:
        sizes, outputs = (tuple(self.graph.tensors[index].shape)[1:3] for index in (x, output))
        stride = options.strideH, options.strideW
        dilation = (
            (1, 1)
            if kind == "ConvTranspose"
            else (options.dilationHFactor, options.dilationWFactor)
        )
        window = Windows.of(codes.shape[2:], stride, 0, dilation)
        padded = outputs if kind == "ConvTranspose" else sizes
        pads = [(0, 0), (0, 0)] if options.padding == VALID else window.same(padded)
        settings = {
            "strides": list(stride),
            "pads": [before for before, _ in pads] + [behind for _, behind in pads],
            "dilations": list(dilation),
            "group": int(self.graph.tensors[x].shape[3]) // codes.shape[1],
        }
        return settings

    def _grid(self, index: int) -> ActivationGrid:
        tensor = self.graph.tensors[index]
        top = WORD if self.types[tensor.type] == "INT16" else BYTE
        zero = self._zero_point(index) + (top + 1) // 2
        return ActivationGrid(
            scale=float(tensor.quantization.scale[0]), zero_point=float(zero), qmin=0, qmax=top
        )

    def _zero_point(self, index: int) -> int:
        return int(self.graph.tensors[index].quantization.zeroPoint[0])

    def _constant(self, index: int) -> Array:
        tensor = self.graph.tensors[index]
        data, shape, kind = (
            self.model.buffers[tensor.buffer].data,
            tuple(tensor.shape),
            self.types[tensor.type],
        )
        if kind == "INT4":
            return unpack_nibbles(data, int(np.prod(shape))).reshape(shape)
        return np.frombuffer(bytes(data), getattr(np, kind.lower())).reshape(shape)
