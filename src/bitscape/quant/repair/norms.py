"""What output correction does at batch norms that were not folded: their statistics take it."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bitscape.errors import BitscapeError, nearest
from bitscape.quant.convert import Data
from bitscape.quant.repair.channels import ChannelMoments, run_side_by_side


def norms_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that use running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


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
    run_side_by_side(float_model, model, data, correcting_hooks(model, float_model))


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
        self.inputs = ChannelMoments(norm.num_features, norm.running_mean.device)

    def see_float(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take in what the float network's norm is called with."""
        self.inputs.see_float(inputs[0])

    def correct(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take in what the norm is called with, and move its statistics before it runs."""
        self.inputs.see_quantized(inputs[0])
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Set the norm's statistics."""
        gain, (expected, seen) = self.inputs.gain(), (self.inputs.expected[0], self.inputs.seen[0])
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(seen + (self.mean - expected) / gain)
        self.norm.running_var.copy_(self.variance / gain.square())
