"""Repairing a network after it was quantized without training: rounding that cancels its errors, and bias correction.

`equalize` belongs before `quantize`, on the float network; `repair` does the rest afterwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from bitscape.calling import Inputs, sample_count
from bitscape.errors import BitscapeError, nearest
from bitscape.models.prepare import as_prepared
from bitscape.quant.convert import Data, batches_of
from bitscape.quant.repair.adaptive import adaptations, adaptive_rounding
from bitscape.quant.repair.bias import correct_biases
from bitscape.quant.repair.equalize import ChannelClip, Equalized, equalize
from bitscape.quant.repair.in_order import round_in_order
from bitscape.quant.repair.moments import BATCH, InputMoments, input_moments
from bitscape.quant.repair.rounding import (
    Rounding,
    RoundingError,
    compensate_rounding,
    compensations,
    log_errors,
)

__all__ = [
    "ChannelClip",
    "Equalized",
    "InputMoments",
    "RoundingError",
    "adaptive_rounding",
    "compensate_rounding",
    "correct_biases",
    "equalize",
    "input_moments",
    "repair",
]

HELD = 1024
"""Samples of an iterator that are held for a second pass."""
_ROUNDINGS: dict[str, Callable[[], Sequence[Rounding]]] = {
    "compensate": compensations,
    "adaptive": adaptations,
}

_NAMES = {"compensate": "compensated rounding", "adaptive": "adaptive rounding"}


def repair(
    model: nn.Module,
    float_model: nn.Module,
    data: Data,
    *,
    moments: Mapping[str, InputMoments] | None = None,
    rounding: str | None = "compensate",
    bias: bool = True,
) -> nn.Module:
    """Repair a quantized and calibrated `model` in place, and return it: rounding first, then biases.

    Args:
        model: what `quantize` and `calibrate` returned, by LSQ or LSQ+.
        float_model: the network that was quantized, norms folded.
        data: samples, a tensor (n, ...), or batches of inputs; normalized, no labels. 128 samples are enough for most
            networks. They are gone through twice; of an iterator, which can be gone through once, the first 1,024
            samples are held in memory, and biases are corrected on those.
        moments: `input_moments(float_model, data)`, if they are at hand from an earlier policy.
        rounding: "compensate" (seconds), "adaptive" (minutes), or None.
        bias: correct biases.

    Raises:
        BitscapeError: an unknown `rounding`, or what `compensate_rounding` and `correct_biases` raise.
    """
    if rounding is not None and rounding not in _ROUNDINGS:
        raise BitscapeError(f"rounding = {rounding!r}: allowed are {', '.join(_ROUNDINGS)} and None{nearest(rounding, _ROUNDINGS)}")
    float_model = as_prepared(float_model)
    if rounding is not None:
        again = data
        if isinstance(data, Iterator):
            again = list(_first(data, HELD))
            data = chain(again, data)
        if moments is None:
            moments = input_moments(float_model, data)
        batches = batches_of(again, model, BATCH)
        methods = _ROUNDINGS[rounding]()
        errors = round_in_order(model, float_model, batches, moments, methods, correct=bias)
        log_errors(_NAMES[rounding], errors)
    elif bias:
        correct_biases(model, float_model, data)
    return model


def _first(batches: Iterator[Inputs], count: int) -> Iterator[Inputs]:
    """Yield batches until they hold `count` samples."""
    while count > 0 and (inputs := next(batches, None)) is not None:
        yield inputs
        count -= sample_count(inputs)
