"""What output correction does at batch norms that were not folded: their statistics take it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bitscape.calling import call
from bitscape.errors import BitscapeError, explained_forward, nearest
from bitscape.models.modes import evaluating
from bitscape.quant.convert import Data, batches_of
from bitscape.quant.once import weights_quantized_once

RATIO_LIMIT = 4.0
"""Ratios of variances stay within 1/4 .. 4, as gains of outputs stay within 1/2 .. 2."""


def norms_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that use running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def correct_norms(model: nn.Module, float_model: nn.Module, data: Data) -> None:
    """Give each channel after a batch norm the float network's mean and deviation, by the norm's statistics.

    In place; norm after norm, so that later ones see corrected inputs.

    Args:
        model: quantized and calibrated.
        float_model: the network that was quantized.
        data: samples, a tensor (n, ...), or batches of inputs; normalized.

    Raises:
        BitscapeError: a norm that the float network lacks.
    """
    handles = correcting_hooks(model, float_model)
    try:
        with evaluating(model), evaluating(float_model), weights_quantized_once(model):
            for inputs in batches_of(data, model):
                with explained_forward(inputs):
                    call(float_model, inputs)
                    call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def correcting_hooks(model: nn.Module, float_model: nn.Module) -> list[RemovableHandle]:
    """Hooks that correct the norms of `model` while both networks run on the same batches, the float one first."""
    norms, partners = norms_with_statistics(model), norms_with_statistics(float_model)
    if missing := [name for name in norms if name not in partners]:
        raise BitscapeError(
            f"float_model: it has no norm {missing[0]!r}{nearest(missing[0], partners)}; "
            "pass the network that was quantized"
        )
    handles = []
    for name, norm in norms.items():
        correction = NormCorrection(norm)
        handles.append(partners[name].register_forward_pre_hook(correction.see_float))
        handles.append(norm.register_forward_pre_hook(correction.correct))
    return handles


class NormCorrection:
    """One norm's inputs in the float and the quantized network, averaged over the calls so far.

    The norm's statistics move as its inputs did, so that it gives each channel the mean and the
    deviation it has in the float network on the same images. Statistics taken anew would also follow
    what sets these few images apart from all others.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        self.norm = norm
        self.mean = norm.running_mean.double().clone()
        self.variance = norm.running_var.double().clone()
        self.images = 0
        self.waiting: list[Tensor] = []
        self.expected = self.seen = torch.zeros(
            2, norm.num_features, dtype=torch.float64, device=norm.running_mean.device
        )

    def see_float(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take in what the float network's norm is called with."""
        self.waiting.append(channel_moments(inputs[0]))

    def correct(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take in what the norm is called with, and move its statistics before it runs."""
        share = len(inputs[0]) / (self.images + len(inputs[0]))
        self.expected = torch.lerp(self.expected, self.waiting.pop(0), share)
        self.seen = torch.lerp(self.seen, channel_moments(inputs[0]), share)
        self.images += len(inputs[0])
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Set the norm's statistics."""
        expected, seen = variance(self.expected), variance(self.seen)
        varies = (expected > 0) & (seen > 0)
        ratio = torch.where(varies, seen / torch.where(varies, expected, 1.0), 1.0)
        ratio = ratio.clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(self.seen[0] + (self.mean - self.expected[0]) * ratio.sqrt())
        self.norm.running_var.copy_(self.variance * ratio)


def channel_moments(values: Float[Tensor, "n c ..."]) -> Float[Tensor, "2 c"]:
    """Mean and mean square of each channel, float64."""
    # What norms take of a batch; torch.var_mean over several dimensions needs ten times as long.
    mean, spread = torch.batch_norm_update_stats(values.float(), None, None, 0.0)
    return torch.stack([mean.double(), spread.double() + mean.double().square()])


def variance(moments: Float[Tensor, "2 c"]) -> Float[Tensor, " c"]:
    """Variance of each channel, at least 0."""
    return (moments[1] - moments[0].square()).clamp(min=0.0)
