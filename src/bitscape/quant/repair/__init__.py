"""Repairing a network after it was quantized without training: rounding that cancels its errors, and bias correction.

`equalize` belongs before `quantize`, on the float network; `repair` does the rest afterwards.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from bitscape.errors import BitscapeError, nearest
from bitscape.models.prepare import as_prepared
from bitscape.quant.convert import Data, batches_of
from bitscape.quant.repair.adaptive import adaptations, adaptive_rounding
from bitscape.quant.repair.bias import correct_biases
from bitscape.quant.repair.equalize import ChannelClip, Equalized, equalize
from bitscape.quant.repair.in_order import round_in_order
from bitscape.quant.repair.moments import BATCH, InputMoments, input_moments
from bitscape.quant.repair.norms import correct_norms, norms_with_statistics
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
    rounding: str | None = "compensate",
    bias: bool = True,
) -> nn.Module:
    """Repair a quantized and calibrated `model` in place, and return it.

    Layer after layer gets its codes, and then its scales and bias, from what all layers before it
    really give.

    Args:
        model: what `quantize` and `calibrate` returned, by LSQ or LSQ+.
        float_model: the network that was quantized, norms folded.
        data: samples, a tensor (n, ...), or batches of inputs; normalized, no labels. 256 samples
            are enough for most networks. They are gone through once, and again for norms that are
            not folded; batches of an iterator are then held.
        rounding: "compensate" (seconds), "adaptive" (minutes), or None.
        bias: correct biases.

    Raises:
        BitscapeError: an unknown `rounding`, or what `compensate_rounding` and `correct_biases` raise.
    """
    if rounding is not None and rounding not in _ROUNDINGS:
        raise BitscapeError(
            f"rounding = {rounding!r}: allowed are {', '.join(_ROUNDINGS)} and None"
            f"{nearest(rounding, _ROUNDINGS)}"
        )
    float_model = as_prepared(float_model)
    if rounding is None:
        if bias:
            correct_biases(model, float_model, data)
        return model
    has_norms = bool(norms_with_statistics(model))
    if has_norms and isinstance(data, Iterator):
        data = list(data)
    batches = batches_of(data, model, BATCH)
    errors = round_in_order(model, float_model, batches, _ROUNDINGS[rounding](), correct=bias)
    log_errors(_NAMES[rounding], errors)
    if bias and has_norms:
        correct_norms(model, float_model, data)
    return model
