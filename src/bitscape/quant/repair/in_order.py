"""Rounding layer after layer: each weight also makes good what the layers before did to its input.

Both networks run on the data side by side and stop at every layer, so that all data have reached a
layer before its codes are chosen, and no layer runs twice. Where maps are large, fewer samples come
along at first; the others catch up behind.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.modes import evaluating
from bitscape.nested import tensors_in
from bitscape.progress import track
from bitscape.quant.chains import shared_parameters
from bitscape.quant.functional import without_autocast
from bitscape.quant.layers import has_channel_scales
from bitscape.quant.repair.bias import Correction, log_shifts, partners_of
from bitscape.quant.repair.moments import BATCH, InputMoments, mean_of
from bitscape.quant.repair.pairs import FreedMemory, Pair
from bitscape.quant.repair.rounding import (
    Rounding,
    RoundingError,
    compensations,
    roundable_layers,
    task_of,
)

_log = logging.getLogger("bitscape.quant.repair")
DAMPING = 0.01
"""Share of the mean diagonal that is added before the inverse is taken."""
MAP_BYTES = 1 << 28
"""Most bytes of the inputs and outputs of one layer, for all samples in both networks."""


def round_in_order(
    model: nn.Module,
    float_model: nn.Module,
    batches: Iterable[Inputs],
    methods: Sequence[Rounding],
    *,
    correct: bool = True,
) -> dict[str, RoundingError]:
    """Choose and write the codes of every layer when all data have reached it.

    Args:
        model: quantized by LSQ or LSQ+ and calibrated; changed in place.
        float_model: the network that was quantized, prepared.
        batches: inputs, on the networks' device.
        methods: of which `RoundingTask.best` picks one for each layer.
        correct: give each layer's output its float mean and deviation before it goes on, as
            `correct_biases` does.

    Returns:
        Layer name -> squared output errors before and after, in the order of the calls.

    Raises:
        BitscapeError: no image, a layer that the float network lacks, or what
            `compensate_rounding` raises.
    """
    rounder = _Rounder(model, float_model, methods, correct)
    with evaluating(model), evaluating(float_model), without_autocast():
        rounder.run(inputs for batch in batches for inputs in _cut(batch))
    for name in rounder.layers.keys() - rounder.errors.keys():
        _log.warning("layer %s: nearest rounding; it never ran, or not with its own weight", name)
    if rounder.shifts:
        log_shifts(rounder.shifts)
    return rounder.errors


def _cut(inputs: Inputs) -> Iterator[Inputs]:
    return (batch.inputs for batch in Samples.of(inputs).batches(BATCH))


def corrected_target(
    weight: Float[Tensor, "g r k"],
    moments: Float[Tensor, "g k k"],
    missing: Float[Tensor, "g k k"],
    samples: int,
) -> Float[Tensor, "g r k"]:
    """The weight t with the least |t x - w y|^2 over inputs x that took the place of y.

    Least squares: t - w = w E[(y - x) x^T] E[x x^T]^-1, with a ridge of k / samples of the
    diagonal: few samples of many inputs fit themselves.

    Args:
        weight: w.
        moments: E[x x^T].
        missing: E[(y - x) x^T].
        samples: that both average.
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(moments.dtype).tiny)
    ridge = diagonal / mean * (moments.shape[1] / samples) + DAMPING
    unit = mean[:, :, None]
    damped = moments / unit + torch.diag_embed(ridge)
    shift: Tensor = torch.linalg.solve(damped, (weight @ (missing / unit)).mT).mT
    return weight + shift


class _Rounder:
    def __init__(
        self,
        model: nn.Module,
        float_model: nn.Module,
        methods: Sequence[Rounding],
        correct: bool,
    ) -> None:
        self.model, self.float_model, self.methods = model, float_model, methods
        self.layers, self.shared = roundable_layers(model), shared_parameters(model)
        self.correct = correct
        self.inputs: dict[str, _Inputs] = {}
        self.freed = FreedMemory()
        self.errors: dict[str, RoundingError] = {}
        self.shifts: dict[str, float] = {}

    def run(self, batches: Iterator[Inputs]) -> None:
        """Take the batches from layer to layer, as many at once as memory allows."""
        first = next(batches, None)
        if first is None:
            raise BitscapeError("images: no batch; give at least one image, better a few hundred")
        sizes = map_bytes(self.float_model, self.layers, first)
        pairs: list[Pair] = []
        stops = self._stops(pairs, chain([first], batches), sizes)
        try:
            for name in track(stops, label="rounding", total=len(self.layers)):
                self._round(name, [pair for pair in pairs if pair.name == name])
        finally:
            for pair in pairs:
                pair.close()

    def _stops(
        self, pairs: list[Pair], batches: Iterator[Inputs], sizes: Mapping[str, int]
    ) -> Iterator[str]:
        """Yield the layers that `pairs` stop at; more batches join them where maps leave room."""
        while not self.errors or pairs:
            samples = BATCH + sum(pair.samples for pair in pairs)
            has_room = not pairs or samples * sizes[pairs[0].name] <= MAP_BYTES
            inputs = next(batches, None) if has_room else None
            if inputs is not None:
                pairs.append(self._pair(inputs))
                self._see_inputs(pairs[-1])
            elif not pairs:
                return
            else:
                yield pairs[0].name
            pairs[:] = [pair for pair in pairs if pair.name]

    def _pair(self, inputs: Inputs) -> Pair:
        return Pair(self.float_model, self.model, inputs, self.layers, self.errors)

    def _see_inputs(self, pair: Pair) -> None:
        """Add up the rows that the pair stands at; of all batches they would fill the memory."""
        if pair.name:
            self.inputs.setdefault(pair.name, _Inputs()).see(*pair.take())
        self.freed.release()

    def _round(self, name: str, pairs: Sequence[Pair]) -> None:
        layer: Any = self.layers[name]
        own_scales = layer.weight not in self.shared and has_channel_scales(layer)
        seen = self.inputs.pop(name)
        moments = seen.moments(name)
        task = task_of(layer, moments)
        if layer.weight not in self.shared:
            missing = mean_of(name, seen.missing, task.samples)
            target = corrected_target(task.weight, moments.mean, missing, task.samples)
            task = replace(task, weight=target)
        if own_scales:
            task = task.fitted(compensations()[0](task))
        self.errors[name] = task.round(self.methods)
        weight = layer.weight_quantizer(layer.weight)
        for pair in pairs:
            pair.advance(weight)
        if layer.bias is None or not self.correct:
            self._leave(pairs, lambda output: output)
            return
        correction = Correction(layer, own_scales)
        for pair in pairs:
            correction.see_float(layer, None, pair.float_value)
            correction.see_quantized(pair.value)
        self._leave(pairs, correction.corrected)
        self.shifts[name] = correction.write()

    def _leave(self, pairs: Sequence[Pair], output_of: Callable[[Tensor], Tensor]) -> None:
        for pair in pairs:
            pair.advance(output_of(pair.value))
            self._see_inputs(pair)


class _Inputs:
    """Sums over the rows x of one layer, in two parts, and over those y of the float network."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        """Of x x^T; batches go to one part and the other in turn."""
        self.samples = [0, 0]
        self.missing = torch.zeros(())
        """Sum of (y - x) x^T."""
        self._batches = 0

    def see(self, float_rows: Float[Tensor, "g k n"], rows: Float[Tensor, "g k n"]) -> None:
        """Take in the rows of a batch."""
        part = self._batches % 2
        if self._batches < 2:
            self.sums.append(rows @ rows.mT)
        else:
            self.sums[part] += rows @ rows.mT
        missing = (float_rows - rows) @ rows.mT
        self.missing = self.missing.add_(missing) if self._batches else missing
        self.samples[part] += rows.shape[2]
        self._batches += 1

    def moments(self, name: str) -> InputMoments:
        """The means of x x^T."""
        samples = self.samples[: len(self.sums)]
        means = (mean_of(name, *part) for part in zip(self.sums, samples, strict=True))
        return InputMoments(tuple(means), tuple(samples))


def map_bytes(model: nn.Module, names: Collection[str], inputs: Inputs) -> dict[str, int]:
    """Layer name -> most bytes, of a sample, of the inputs and outputs of any layer from it on.

    In two networks.
    """
    layers = partners_of(names, model)
    seen: list[tuple[str, int]] = []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            held = sum(tensor.nbytes for tensor in tensors_in((inputs, output)))
            seen.append((name, 2 * held // samples))

        return hook

    samples = sample_count(inputs)
    handles = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    try:
        with explained_forward(inputs):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    sizes, most = dict.fromkeys(names, 0), 0
    for name, held in reversed(seen):
        most = max(most, held)
        sizes[name] = most
    return sizes
