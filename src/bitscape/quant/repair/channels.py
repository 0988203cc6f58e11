"""Means and deviations of channels in the float and the quantized network, on the same images."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitscape.calling import call
from bitscape.errors import explained_forward
from bitscape.models.modes import evaluating
from bitscape.quant.convert import Data, batches_of
from bitscape.quant.once import weights_quantized_once

GAIN_LIMIT = 2.0
"""Gains stay within 1/2 .. 2: channels that hardly vary give no ratio to trust."""


class ChannelMoments:
    """Mean and mean square of each channel in both networks, averaged over the calls so far."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.expected = self.seen = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self._images = 0
        self._waiting: list[Tensor] = []

    def see_float(self, values: Float[Tensor, "n c ..."]) -> None:
        """Take in values of the float network."""
        self._waiting.append(channel_moments(values))

    def see_quantized(self, values: Float[Tensor, "n c ..."]) -> None:
        """Take in values whose float form has been seen."""
        share = len(values) / (self._images + len(values))
        self.expected = torch.lerp(self.expected, self._waiting.pop(0), share)
        self.seen = torch.lerp(self.seen, channel_moments(values), share)
        self._images += len(values)

    @property
    def any_seen(self) -> bool:
        """Whether the quantized network has come by."""
        return self._images > 0

    def gain(self) -> Float[Tensor, " c"]:
        """What gives the quantized channels the float deviation."""
        expected, seen = (variance(moments).sqrt() for moments in (self.expected, self.seen))
        varies = (seen > 0) & (expected > 0)
        ratio = torch.where(varies, expected / torch.where(varies, seen, 1.0), 1.0)
        return ratio.clamp(1 / GAIN_LIMIT, GAIN_LIMIT)


def channel_moments(values: Float[Tensor, "n c ..."]) -> Float[Tensor, "2 c"]:
    """Mean and mean square of each channel, float64."""
    # What norms take of a batch; torch.var_mean over several dimensions needs ten times as long.
    mean, spread = torch.batch_norm_update_stats(values.float(), None, None, 0.0)
    return torch.stack([mean.double(), spread.double() + mean.double().square()])


def variance(moments: Float[Tensor, "2 c"]) -> Float[Tensor, " c"]:
    """Variance of each channel, at least 0."""
    return (moments[1] - moments[0].square()).clamp(min=0.0)


@torch.no_grad()
def run_side_by_side(
    float_model: nn.Module, model: nn.Module, data: Data, hooks: Iterable[RemovableHandle]
) -> None:
    """Run each batch through the float and then through the quantized network; then remove the hooks."""
    try:
        with evaluating(model), evaluating(float_model), weights_quantized_once(model):
            for inputs in batches_of(data, model):
                with explained_forward(inputs):
                    call(float_model, inputs)
                    call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
