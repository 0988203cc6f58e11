"""TFLite files in LiteRT, the runtime that was TensorFlow Lite, on the CPU."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.runtimes.packages import runtime_module, silent_process, version_of
from bitscape.runtimes.sessions import Feed, by_name, refused

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LiteRt:
    """LiteRT on the CPU, with its default kernels (XNNPACK)."""

    threads: int = 1
    """Threads inside an operator."""

    @property
    def version(self) -> str:
        """Name and version."""
        return f"litert {version_of('ai-edge-litert', 'ai_edge_litert')}"

    def open(self, model: str | os.PathLike[str] | bytes) -> "LiteRtSession":
        """Load a .tflite file, or its content. Raises BitscapeError if the runtime refuses it."""
        return LiteRtSession(model, self.threads)


class LiteRtSession:
    """A file in LiteRT.

    It takes and returns floats, images as (n, c, h, w), as the network does that the file was made of: here they are brought to the codes
    of the file's inputs, one sample after another with channels last, and back from those of its outputs.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int) -> None:
        interpreter = runtime_module("ai_edge_litert.interpreter").Interpreter
        source = (
            {"model_content": model}
            if isinstance(model, bytes)
            else {"model_path": os.fspath(model)}
        )
        try:
            with silent_process():  # it says which kernels it took
                self._interpreter = interpreter(**source, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise refused("LiteRT", model, error) from error
        self._inputs = {
            details["name"]: details for details in self._interpreter.get_input_details()
        }
        self._outputs = {
            details["name"]: details for details in self._interpreter.get_output_details()
        }
        self.inputs, self.outputs = tuple(self._inputs), tuple(self._outputs)

    def run(self, inputs: Feed) -> list[Array]:
        found = list(
            self._each(inputs, lambda: [self._float(details) for details in self._outputs.values()])
        )
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def codes(self, inputs: Feed, tensors: Collection[int]) -> dict[int, Array]:
        """The integers of inputs and outputs of the file, by their numbers in it, for a batch."""
        found = list(
            self._each(
                inputs, lambda: {index: self._interpreter.get_tensor(index) for index in tensors}
            )
        )
        return {index: np.concatenate([one[index] for one in found]) for index in tensors}

    def float_layers(self) -> list[str]:
        """None: the files that are written have integer operators alone."""
        return []

    def invoke(self) -> None:
        """Compute the sample that was given last once more."""
        self._interpreter.invoke()

    def _each(self, inputs: Feed, read: Callable[[], Any]) -> Iterator[Any]:
        arrays = by_name(inputs, self.inputs)
        for at in range(len(next(iter(arrays.values())))):
            for name, details in self._inputs.items():
                self._interpreter.set_tensor(
                    details["index"], _quantized(arrays[name][at : at + 1], details)
                )
            self._interpreter.invoke()
            yield read()

    def _float(self, details: dict[str, Any]) -> Array:
        codes = self._interpreter.get_tensor(details["index"])
        scale, zero_point = details["quantization"]
        return channels_second(
            (codes.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
        )


def _quantized(values: Array, details: dict[str, Any]) -> Array:
    scale, zero_point = details["quantization"]
    codes = np.rint(values.astype(np.float32) / np.float32(scale)) + zero_point
    limits = np.iinfo(details["dtype"])
    codes = np.clip(codes, limits.min, limits.max).astype(details["dtype"])
    return np.ascontiguousarray(np.moveaxis(codes, 1, -1)) if codes.ndim == 4 else codes


def channels_second(values: Array) -> Array:
    """Images with channels last as torch has them; others as they are."""
    return np.ascontiguousarray(np.moveaxis(values, -1, 1)) if values.ndim == 4 else values
