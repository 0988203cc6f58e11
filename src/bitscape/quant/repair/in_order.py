"""Rounding layer after layer: each weight also makes good what the layers before did to its input.

The float network runs beside the quantized one, a layer ahead, so that memory holds the maps of one
batch in either network, and the inputs of one layer.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Full, Queue
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.errors import explained_forward
from bitscape.models.layers import has_weight, quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.quant.chains import shared_parameters
from bitscape.quant.functional import without_autocast
from bitscape.quant.layers import QuantizedLayer, quantized_layers
from bitscape.quant.repair.moments import InputMoments, LayerInputs
from bitscape.quant.repair.rounding import (
    Rounding,
    RoundingError,
    RoundingTask,
    best_codes,
    rounding_tasks,
    shrunk,
)

POSITIONS = 128
"""Output positions (or tokens) of each image that are compared, drawn at random."""
DAMPING = 0.01
"""Share of the mean diagonal that is added before the inverse is taken."""


def round_in_order(
    model: nn.Module,
    float_model: nn.Module,
    inputs: Inputs,
    moments: Mapping[str, InputMoments],
    methods: Sequence[Rounding],
) -> dict[str, RoundingError]:
    """Choose and write the codes of every layer when it runs for the first time.

    Args:
        model: quantized by LSQ or LSQ+ and calibrated; changed in place.
        float_model: the network that was quantized, prepared.
        inputs: one batch, which both networks run on once.
        moments: `input_moments` of the float network; layers without moments keep nearest rounding.
        methods: of which `best_codes` takes one for each layer.

    Returns:
        Layer name -> squared output errors before and after.

    Raises:
        BitscapeError: what `compensate_rounding` raises.
    """
    tasks = rounding_tasks(model, moments)
    layers, partners = quantized_layers(model), quantizable_layers(float_model)
    ahead = {name: partners[name] for name in layers if name in partners}
    with evaluating(model), evaluating(float_model), running_ahead(float_model, ahead, inputs) as wait:
        rounder = _Rounder(tasks, methods, shared_parameters(model))
        with rounder.watching(layers, wait), rounder, explained_forward(inputs):
            call(model, inputs)
    return rounder.errors


def corrected_target(
    weight: Float[Tensor, "g r k"], rows: Float[Tensor, "g k n"], expected: Float[Tensor, "g k n"]
) -> Float[Tensor, "g r k"]:
    """The weight t with the least |t x - w y|^2 over inputs x = `rows` in place of y = `expected`.

    Least squares: t - w = w E[(y - x) x^T] E[x x^T]^-1, the second mean shrunk towards its diagonal
    as for rounding, since n samples of k inputs fit themselves.
    """
    samples = rows.shape[2]
    moments = shrunk(rows @ rows.mT / samples, samples, 1.0)
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(moments.dtype).tiny)
    identity = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    damped = moments / mean[:, None, None] + DAMPING * identity
    missing = weight @ ((expected - rows) @ rows.mT / samples) / mean[:, None, None]
    return weight + torch.linalg.solve(damped, missing.mT).mT


class _Rows(LayerInputs):
    """The inputs of each layer's first call, at the same positions in every network."""

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        super().__init__(names, POSITIONS, torch.Generator())

    def drawn(self, rows: Iterator[Tensor]) -> Float[Tensor, "g k n"]:
        """All rows of one call."""
        self.generator.manual_seed(0)
        return torch.cat(list(rows), 2)


class _Rounder(_Rows):
    """Gives each layer its codes before its weight is first used."""

    def __init__(
        self,
        tasks: Mapping[str, RoundingTask],
        methods: Sequence[Rounding],
        shared: set[nn.Parameter],
    ) -> None:
        super().__init__({})
        self.tasks, self.methods, self.shared = tasks, methods, shared
        self.expected: Tensor | None = None
        self.running = ""
        self.errors: dict[str, RoundingError] = {}

    @contextmanager
    def watching(
        self, layers: Mapping[str, QuantizedLayer], wait: Callable[[str], Tensor | None]
    ) -> Iterator[None]:
        """Within the block a layer waits for the float network, and its quantized weight is known."""

        def start_of(name: str) -> Callable[..., None]:
            def start(module: nn.Module, inputs: Any) -> None:
                self.running, self.expected = name, wait(name)

            return start

        def name_weight(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.names = {output: self.running}

        quantizers = {layer.weight_quantizer for layer in layers.values() if has_weight(layer)}
        handles = [layer.register_forward_pre_hook(start_of(name)) for name, layer in layers.items()]
        handles += [quantizer.register_forward_hook(name_weight) for quantizer in quantizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, name: str, rows: Iterator[Tensor]) -> Tensor | None:
        if name in self.errors or name not in self.tasks:
            return None
        with without_autocast():
            task = self._corrected(self.tasks[name], rows)
            self.errors[name] = task.write(best_codes(task, self.methods))
        layer: Any = task.layer
        return cast(Tensor, layer.weight_quantizer(layer.weight))

    def _corrected(self, task: RoundingTask, rows: Iterator[Tensor]) -> RoundingTask:
        if self.expected is None or task.layer.weight in self.shared:
            return task
        target = corrected_target(task.weight, self.drawn(rows), self.expected)
        return replace(task, weight=target)


class _Ahead(_Rows):
    """Holds the inputs of the layer that is running."""

    rows: Tensor | None = None

    def see(self, name: str, rows: Iterator[Tensor]) -> None:
        self.rows = self.drawn(rows)


class _Stopped(Exception):
    """Nobody waits for the float network any more."""


@contextmanager
def running_ahead(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs
) -> Iterator[Callable[[str], Tensor | None]]:
    """Run `model` in a thread of its own, at most two layers ahead of who asks for their inputs.

    Yields a function that waits until the named layer has run once more, and returns the inputs
    that it had, (g, k, n), or None where it does not run, or not with its own weight.
    """
    results: Queue[tuple[str, Tensor | None] | BaseException | None] = Queue(maxsize=1)
    received: dict[str, list[Tensor | None]] = {}
    ahead = _Ahead({layer.get_parameter("weight"): n for n, layer in layers.items() if has_weight(layer)})
    stopped, ended = threading.Event(), False

    def hand_over(result: tuple[str, Tensor | None] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                return results.put(result, timeout=0.1)
        raise _Stopped

    def after(name: str) -> Callable[..., None]:
        def finish(module: nn.Module, inputs: Any, output: Any) -> None:
            rows, ahead.rows = ahead.rows, None
            hand_over((name, rows))

        return finish

    def run() -> None:
        end: BaseException | None = None
        try:
            with torch.no_grad(), ahead, explained_forward(inputs):
                call(model, inputs)
        except BaseException as error:
            end = error
        with suppress(_Stopped):
            hand_over(end)

    def wait(name: str) -> Tensor | None:
        nonlocal ended
        while not ended and not received.get(name):
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                ended = True
            else:
                received.setdefault(result[0], []).append(result[1])
        return received[name].pop(0) if received.get(name) else None

    handles = [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        stopped.set()
        thread.join()
        for handle in handles:
            handle.remove()
