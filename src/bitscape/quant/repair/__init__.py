"""Repairing a network after it was quantized without training: rounding that cancels its errors, and bias correction.

`equalize` belongs before `quantize`, on the float network; `repair` does the rest afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from bitscape.calling import Inputs, sample_count
from bitscape.errors import BitscapeError, nearest
from bitscape.quant.convert import Data
from bitscape.quant.repair.adaptive import adaptive_rounding
from bitscape.quant.repair.bias import correct_biases
from bitscape.quant.repair.equalize import ChannelClip, Equalized, equalize
from bitscape.quant.repair.moments import input_moments
from bitscape.quant.repair.rounding import RoundingError, compensate_rounding

__all__ = [
    "ChannelClip",
    "Equalized",
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
_ROUNDINGS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], dict[str, RoundingError]]] = {
    "compensate": compensate_rounding,
    "adaptive": adaptive_rounding,
}


def repair(
    model: nn.Module,
    float_model: nn.Module,
    data: Data,
    *,
    moments: Mapping[str, Tensor] | None = None,
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
    second = data
    if rounding is not None:
        if moments is None:
            if bias and isinstance(data, Iterator):
                second = list[Inputs]()
                data = _holding(data, second)
            moments = input_moments(float_model, data)
        _ROUNDINGS[rounding](model, moments)
    if bias:
        correct_biases(model, float_model, second)
    return model


def _holding(batches: Iterable[Inputs], held: list[Inputs]) -> Iterator[Inputs]:
    """Yield the batches; the first ones stay in `held`, HELD samples at most but for one batch."""
    count = 0
    for inputs in batches:
        if count < HELD:
            held.append(inputs)
            count += sample_count(inputs)
        yield inputs
