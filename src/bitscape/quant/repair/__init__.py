"""Repairing a network after it was quantized without training: rounding that cancels its errors, and bias correction.

`equalize` belongs before `quantize`, on the float network; `repair` does the rest afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from bitscape.errors import BitscapeError, nearest
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

_ROUNDINGS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], dict[str, RoundingError]]] = {
    "compensate": compensate_rounding,
    "adaptive": adaptive_rounding,
}


def repair(
    model: nn.Module,
    float_model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    moments: Mapping[str, Tensor] | None = None,
    rounding: str | None = "compensate",
    bias: bool = True,
) -> nn.Module:
    """Repair a quantized and calibrated `model` in place, and return it: rounding first, then biases.

    Args:
        model: what `quantize` and `calibrate` returned, by LSQ or LSQ+.
        float_model: the network that was quantized, norms folded.
        images: normalized float32 (n, c, h, w), or batches of them; no labels. 128 are enough for most networks. Batches are
            gone through twice: those of an iterator are held in memory, those of a list or a loader are not.
        moments: `input_moments(float_model, images)`, if they are at hand from an earlier policy.
        rounding: "compensate" (seconds), "adaptive" (minutes), or None.
        bias: correct biases.

    Raises:
        BitscapeError: an unknown `rounding`, or what `compensate_rounding` and `correct_biases` raise.
    """
    if rounding is not None and rounding not in _ROUNDINGS:
        raise BitscapeError(f"rounding = {rounding!r}: allowed are {', '.join(_ROUNDINGS)} and None{nearest(rounding, _ROUNDINGS)}")
    batches = list(images) if isinstance(images, Iterator) else images  # twice through them
    if rounding is not None:
        _ROUNDINGS[rounding](model, input_moments(float_model, batches) if moments is None else moments)
    if bias:
        correct_biases(model, float_model, batches)
    return model
