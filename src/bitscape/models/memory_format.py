"""The memory format in which a network's convolutions run: channels_last where the network takes it."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bitscape.calling import Inputs, map_tensors
from bitscape.errors import BitscapeError, first_line
from bitscape.models.modes import unchanged
from bitscape.models.trial import Trial, differ, is_empty, trial
from bitscape.nested import tensors_in

_log = logging.getLogger("bitscape.models")


def set_memory_format(
    model: nn.Module, inputs: Inputs, channels_last: bool | None, *, training: bool = False
) -> bool:
    """Lay out the weights of 2-d convolutions in place; return whether the network runs in channels_last.

    Args:
        model: any network; its values, modes and the random states stay as they are.
        inputs: what it is called with, normalized; two samples are tried. Where the network fails on them in any
            format, that is left to the caller's passes to say.
        channels_last: None = where the network gives the same outputs as in the contiguous format.
            Convolutions then run up to 1.4 times as fast on CPUs.
        training: whether the network must run in training mode too.

    Raises:
        BitscapeError: `channels_last` is True, and the network does not take it.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, _ConvNd) and m.weight.ndim == 4]
    _lay_out(weights, torch.contiguous_format)
    if channels_last is False or not weights or is_empty(model) or not any(map(_is_image, tensors_in(inputs))):
        return False
    with trial(model, inputs) as run, unchanged(model):
        reason = _obstacle(run, weights, training)
    if reason is None:
        return True
    if channels_last:
        raise BitscapeError(
            f"channels_last: True, but the network does not take that memory format: {reason}; "
            "leave channels_last out, or give False"
        )
    _lay_out(weights, torch.contiguous_format)
    _log.info("the network does not take channels_last and runs in contiguous memory format: %s", reason)
    return False


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4


def _in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if _is_image(tensor) else tensor


def _lay_out(weights: Sequence[Tensor], memory_format: torch.memory_format) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=memory_format)


def _obstacle(run: Trial, weights: Sequence[Tensor], training: bool) -> str | None:
    """Lay the weights out in channels_last; say why the network does not take it, or None if it does."""
    expected, fails = _outcome(run)
    _lay_out(weights, torch.channels_last)
    if fails is not None:
        return None  # in any format: the caller's own passes say it better
    laid_out = replace(run, inputs=map_tensors(_in_channels_last, run.inputs))
    outputs, fails = _outcome(laid_out)
    if fails is None and differ(expected, outputs):
        return "it gives other outputs"
    return fails or (_obstacle_in_training(run, laid_out, weights) if training else None)


def _obstacle_in_training(run: Trial, laid_out: Trial, weights: Sequence[Tensor]) -> str | None:
    """Likewise in training mode, which changes the network's statistics; its outputs are not compared."""
    run.model.train()
    try:
        fails = _outcome(laid_out)[1]
        if fails is not None:
            _lay_out(weights, torch.contiguous_format)
            fails_too = _outcome(run)[1] is not None
            _lay_out(weights, torch.channels_last)
            return None if fails_too else fails
        return None
    finally:
        run.model.eval()


def _outcome(run: Trial) -> tuple[list[Tensor], str | None]:
    """The outputs, or what the network says where it fails."""
    try:
        return run.again(), None
    except Exception as error:
        return [], first_line(error.__cause__ or error)
