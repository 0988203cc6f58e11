"""Batch norms folded into the layers before them: the same network with fewer steps, as runtimes and repair want it."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.models.copies import copied
from bitscape.models.layers import WEIGHTED, output_channels, outputs_first
from bitscape.models.modes import evaluating
from bitscape.models.prepare import check_layers
from bitscape.models.replace import replace_module
from bitscape.models.trial import check_repeatable
from bitscape.quant.chains import (
    Call,
    called_once,
    checked_example,
    only_user,
    outputs_of,
    record_calls,
    require_same,
    same,
    shared_parameters,
    tolerance_of,
)
from bitscape.quant.convert import bypassed
from bitscape.quant.functional import MINIMUM_SCALE, without_autocast
from bitscape.quant.layers import QuantizedLayer, has_channel_scales
from bitscape.quant.quantizers.lsq import LsqWeight
from bitscape.quant.reference import widened

_log = logging.getLogger("bitscape.quant")


@without_autocast()
def fold_norms(model: nn.Module, example: Samples | Inputs, *, inplace: bool = False) -> nn.Module:
    """Fold every batch norm into the convolution or linear layer before it, by its running statistics, and put nn.Identity in its place.

    A layer without a bias gets one. Left as they are, and counted in the log: norms behind nothing foldable, layers or
    norms that run more than once or share parameters, and layers whose output something else takes too.

    A network quantized by LSQ with one weight scale per output channel is folded exactly, after training: the folded
    weight is the former quantized weight times gamma / sigma, and lies on the former codes times its sign; the latent
    weight is gone.

    Args:
        model: network; it is copied unless `inplace`.
        example: inputs of the model, normalized; one sample finds the pairs, all of them check the result. Of `Samples` those of the
            first shape.
        inplace: change `model` itself.

    Raises:
        BitscapeError: a model or example that is not float32; a layer that cannot take bits; outputs that
            differ from run to run or are NaN; the
            output on `example` changed, because the network uses a layer in a way that the pass could
            not show; or a quantized layer cannot be folded exactly (another quantizer, one scale per tensor, or the
            code -2^(b-1) where gamma is negative), in which case `model` is unchanged even with `inplace`.
    """
    check_layers(model)
    example = checked_example(example, model)
    model = model if inplace else copied(model)
    with bypassed(model, "input_quantizer"):
        check_repeatable(model, example)
    calls = record_calls(model, example)
    pairs = norm_pairs(model, calls)
    obstacles = [f"{pair.name}: {reason}" for pair in pairs if (reason := _obstacle(pair))]
    if obstacles:
        raise BitscapeError(
            "model: its norms cannot be folded exactly; fold the float network before quantizing it, or keep the norms. "
            + "; ".join(obstacles)
        )
    with bypassed(model, "input_quantizer"):  # a rounded activation would turn float noise into steps
        before = outputs_of(model, example)
        folded = sum(_fold_checked(model, pair) for pair in pairs)
        after = outputs_of(model, example)
    reason = "it uses a convolution's output or weight in a hidden way"
    require_same(before, after, what="fold_norms", reason=reason, tolerance=tolerance_of(calls))
    _log.info("folded %d of %d batch norms", folded, folded + sum(isinstance(m, _BatchNorm) for m in model.modules()))
    return model


@dataclass(frozen=True, eq=False)
class NormPair:
    """A layer whose output goes into a batch norm and nowhere else."""

    name: str
    """The layer's."""
    layer: nn.Module
    norm: _BatchNorm
    input: Tensor
    """What the layer took in the pass that found the pair, in float32."""

    def factor(self) -> Tensor:
        """gamma / sigma of each channel, float64."""
        assert self.norm.running_var is not None
        deviation = (self.norm.running_var.double() + self.norm.eps).sqrt()
        return (torch.ones_like(deviation) if self.norm.weight is None else self.norm.weight.double()) / deviation

    def bias(self) -> Tensor:
        """The folded layer's bias, float64."""
        assert self.norm.running_mean is not None
        bias = self.layer.bias
        shifted = (bias.double() if isinstance(bias, Tensor) else 0.0) - self.norm.running_mean.double()
        return shifted * self.factor() + (0.0 if self.norm.bias is None else self.norm.bias.double())


def norm_pairs(model: nn.Module, calls: list[Call]) -> list[NormPair]:
    """The pairs of `model` that can be folded, found in the calls of one pass."""
    shared = shared_parameters(model)
    once = {module for module in called_once(calls) if shared.isdisjoint(module.parameters(recurse=False))}
    return [pair for call in calls if call.module in once for pair in _pair(call, once)]


def _pair(call: Call, once: set[nn.Module]) -> Iterator[NormPair]:
    user = only_user(call)
    if isinstance(call.module, WEIGHTED) and user is not None and isinstance(user.module, _BatchNorm):
        channels = output_channels(call.module)
        if user.module in once and user.module.running_mean is not None and user.module.num_features == channels:
            assert call.input is not None
            yield NormPair(call.name, call.module, user.module, widened(call.input))


def _fold_checked(model: nn.Module, pair: NormPair) -> bool:
    """Fold one pair; undo it if the layer alone does not give what both gave (weight standardisation, a norm over another axis)."""
    layer = pair.layer
    weight, bias, former = layer.get_parameter("weight"), layer.bias, copy.deepcopy(layer.state_dict())
    with evaluating(model):
        before = pair.norm(layer(pair.input))
        layer.bias = nn.Parameter(pair.bias().to(weight.dtype))
        weight.copy_(_folded_weight(pair))
        if same([before], [layer(pair.input)]):
            replace_module(model, pair.norm, nn.Identity())
            return True
        layer.bias = bias
        layer.load_state_dict(former)
    _log.warning("layer %s: its norm is not folded, because the layer is not linear in its weight", pair.name)
    return False


def _folded_weight(pair: NormPair) -> Tensor:
    """The weight times gamma / sigma, float64; of a quantized layer the quantized weight, whose scales follow."""
    layer, factor = pair.layer, pair.factor()
    weight = layer.get_parameter("weight")
    if not isinstance(layer, QuantizedLayer):
        rows = outputs_first(layer, weight.double()) * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return outputs_first(layer, rows)
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, LsqWeight)
    codes = quantizer.codes(weight)
    factor = factor.reshape(codes.scale.shape)
    scale = codes.scale.double() * factor.abs()
    quantizer.scale.copy_(torch.where(factor == 0, codes.scale, scale))
    return (codes.q.double() - codes.zero_point) * quantizer.scale.double() * factor.sign()


def _obstacle(pair: NormPair) -> str | None:
    """Why a quantized layer cannot be folded exactly; None if it can, or is a float one."""
    if not isinstance(pair.layer, QuantizedLayer):
        return None
    quantizer, weight = pair.layer.weight_quantizer, pair.layer.get_parameter("weight")
    if not isinstance(quantizer, LsqWeight):
        return f"its {type(quantizer).__name__} computes its grid from the weight"
    if not has_channel_scales(pair.layer):
        return "its weight scales are not one per output channel"
    factor = pair.factor().reshape(quantizer.scale.shape)
    codes = quantizer.codes(weight)
    levels = (codes.q - codes.zero_point) * factor.sign()
    grid = quantizer.grid
    outside = int(((levels < grid.qmin - codes.zero_point) | (levels > grid.qmax - codes.zero_point)).sum())
    if outside:
        return f"{outside} weights hold the code {grid.qmin} under a negative gamma, and the grid has no {-grid.qmin}"
    if codes.zero_point and (factor == 0).any():
        return "a gamma is zero, and the grid has no zero"
    if ((codes.scale * factor.abs() < MINIMUM_SCALE) & (factor != 0)).any():
        return f"a folded weight scale is below {MINIMUM_SCALE:g}"
    return None
