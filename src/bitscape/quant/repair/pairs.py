"""The float and the quantized network on the same batch, stopping at the same layers."""

import copy
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count
from bitscape.errors import explained_forward
from bitscape.models.layers import has_weight, quantizable_layers
from bitscape.quant.layers import QuantizedLayer
from bitscape.quant.repair.moments import LayerInputs

POSITIONS = 64
"""Output positions (or tokens) of each image that are compared, drawn at random."""
KEPT_BYTES = 1 << 28
"""Freed memory that the process may keep."""


class Pair:
    """Both networks on one batch.

    They stop at every layer of `names` that is not done: first at its input, then at its output.
    After the last one, or where the two go different ways, `name` is "".
    """

    def __init__(
        self,
        float_model: nn.Module,
        model: nn.Module,
        inputs: Inputs,
        names: Collection[str],
        done: Collection[str],
    ) -> None:
        self.samples = sample_count(inputs)
        self._float = _Run(float_model, inputs, names, done)
        self._quantized = _Run(model, inputs, names, done)
        try:
            self.advance(None)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The layer that both stand at."""
        return self._quantized.name

    @property
    def float_value(self) -> Tensor:
        """Rows (groups, k, n) that the float layer's weight is multiplied with, or its output."""
        return self._float.value

    @property
    def value(self) -> Tensor:
        """The same of the quantized layer; rows are of the same positions."""
        return self._quantized.value

    def take(self) -> tuple[Tensor, Tensor]:
        """Both values, float first, which are held no longer."""
        values = self._float.value, self._quantized.value
        self._float.value = self._quantized.value = torch.empty(0)
        return values

    def advance(self, answer: Tensor | None) -> None:
        """Go on to the next stop, the quantized layer with `answer` as its weight or its output."""
        self._float.advance(None)
        self._quantized.advance(answer)
        if self._float.name != self._quantized.name:
            self.close()

    def close(self) -> None:
        """Stop for good."""
        self._float.close()
        self._quantized.close()


class _Closed(Exception):
    """The run is not wanted any more."""


class _Run(LayerInputs):
    """A network on one batch, in a thread of its own that works only while `advance` waits."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, names: Collection[str], done: Collection[str]
    ) -> None:
        super().__init__({}, POSITIONS, torch.Generator())
        self.model, self.inputs, self.done = _twin(model), inputs, done
        self._watch(names)
        self.name, self.value = "", torch.empty(0)
        self._answer: Tensor | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _watch(self, names: Collection[str]) -> None:
        """While a layer of `names` runs, know its weight: the parameter, or what is made of it."""
        running = ""

        def start_of(name: str) -> Callable[..., None]:
            def start(layer: nn.Module, inputs: Any) -> None:
                nonlocal running
                running = name
                see(layer, inputs, layer.weight)

            return start

        def see(module: nn.Module, inputs: Any, weight: Any) -> None:
            self.names = {weight: running} if running in names else {}

        for name, layer in quantizable_layers(self.model).items():
            if has_weight(layer):
                layer.register_forward_pre_hook(start_of(name))
            if has_weight(layer) and isinstance(layer, QuantizedLayer):
                layer.weight_quantizer.register_forward_hook(see)  # layers may share one

    def advance(self, answer: Tensor | None) -> None:
        """Work until the next stop, where `name` is the layer and `value` its rows or its output."""
        self._answer = answer
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def before(self, name: str, rows: Iterator[Tensor]) -> Tensor | None:
        if name in self.done:
            return None
        self.generator.manual_seed(0)  # the same positions in both networks
        return self._stop(name, torch.cat(list(rows), 2))

    def after(self, name: str, output: Tensor) -> Tensor:
        if name != self.name:
            return output
        answer = self._stop(name, output)
        self.name = ""
        return output if answer is None else answer

    def _stop(self, name: str, value: Tensor) -> Tensor | None:
        self.name, self.value = name, value
        del value  # what `take` takes is then its own
        self._stopped.release()
        self._go.acquire()
        if self._closed:
            raise _Closed
        return self._answer

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                with torch.no_grad(), self, explained_forward(self.inputs):
                    call(self.model, self.inputs)
        except _Closed:
            pass
        except BaseException as error:  # raised where `advance` waits
            self._error = error
        self.name, self.value = "", torch.empty(0)
        self._stopped.release()


class FreedMemory:
    """Gives freed memory back to the system: glibc keeps what each of the many threads freed."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(libc, "malloc_trim", None)
        self._held = resident_bytes() if self._trim else 0

    def release(self) -> None:
        """Give it back where the process has grown by `KEPT_BYTES`; fresh pages cost time."""
        if self._trim and resident_bytes() > self._held + KEPT_BYTES:
            self._trim(0)
            self._held = resident_bytes()


def resident_bytes() -> int:
    """Memory that this process holds, on Linux."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers: what a forward leaves in a module is its own."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)
