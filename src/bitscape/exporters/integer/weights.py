"""Weights and biases as integers, and put back into a traced network as the values that the integers stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import ActivationGrid, Traced, grid_of
from bitscape.exporters.integer.placement import quantized_source
from bitscape.models.layers import PLAIN, WeightLayout
from bitscape.quant.quantizers.base import Codes

LARGEST_BIAS = 2**30
"""Biases are int32, and sums of products are added to them."""
LARGEST_CODE = 127
LEAST_SPACING = 2.0**-125
"""Twice the smallest normal float32: some runtimes take what is smaller for zero."""


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers: real = scale * q, one scale for each output channel as far as `layout` has one."""

    q: Tensor
    """int16 in the weight's shape; within -128..127."""
    scale: Tensor
    """float32 (scales,), not zero; negative where a norm with a negative gamma was folded."""
    layout: WeightLayout = PLAIN
    """Where the outputs lie in `q`."""

    @property
    def rows(self) -> Tensor:
        """The integers with output channels first."""
        return self.layout.outputs_first(self.q)

    @property
    def output_scale(self) -> Tensor:
        """Scale of each output channel, (output channels,)."""
        return self.layout.of_outputs(self.scale, len(self.rows))

    @property
    def bits(self) -> int:
        """Smallest two's complement width that holds every code."""
        low, high = min(-1, int(self.q.min())), max(0, int(self.q.max()))
        return max((-low - 1).bit_length(), high.bit_length()) + 1

    def dequantize(self) -> Tensor:
        """Real values, float32."""
        return self.q.float() * self.layout.along_scales(self.scale, self.q.ndim)


def integer_weight(name: str, codes: Codes) -> IntegerWeight:
    """The weight `name` of these codes. Raises BitscapeError if they need more than 8 bits."""
    q, scale = codes.q.short(), codes.scale.reshape(-1).expand(codes.q.shape[codes.layout.scale_axis]).float()
    if codes.zero_point:  # mid-rise: scale * (q + 1/2) is half the scale times an odd number
        q, scale = 2 * q + 1, scale / 2
    if q.abs().max() > 128:
        raise BitscapeError(f"{name}: levels without a zero at 8 bits need 9-bit integers; give the layer 7 bits, or quantize with Lsq")
    return IntegerWeight(q, scale.clone(), codes.layout)


def with_positive_scales(weight: IntegerWeight) -> IntegerWeight:
    """The same weight with positive scales alone, behind norms of negative gammas: the codes turn instead.

    -128 has no opposite in 8 bits: scales of channels that have it grow by 1/127, and their codes are rounded anew.
    """
    turned = weight.q * weight.layout.along_scales(weight.scale.sign(), weight.q.ndim).short()
    largest = weight.layout.outputs_first(turned).flatten(1).amax(1)
    full = weight.layout.largest(largest, len(weight.scale)) > LARGEST_CODE
    scale = torch.where(full, weight.scale.abs() * (LARGEST_CODE + 1) / LARGEST_CODE, weight.scale.abs())
    ratio = weight.layout.along_scales(weight.scale.abs() / scale, weight.q.ndim)
    return replace(weight, q=(turned * ratio).round().short(), scale=scale)


def integer_bias(graph: fx.Graph, weights: dict[str, IntegerWeight], key: str, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (int64) and the spacing (float32) of a layer's float64 bias: input scale times weight scale.

    Where a channel's spacing is so small that its bias needs more than 30 bits, its weights count for nothing beside the bias: they get the
    spacing that the bias needs. The same holds where the spacing would leave the range of float32, behind inputs that were all zero.
    """
    scale, weight = input_scale(graph, key), weights[key]
    needed = weight.layout.largest(bias.abs(), len(weight.scale))
    smallest = (needed / (scale * LARGEST_BIAS)).clamp(min=LEAST_SPACING / scale).float()
    narrow = weight.scale.abs() < smallest
    if bool(narrow.any()):
        wider = torch.where(narrow, smallest.copysign(weight.scale), weight.scale)
        ratio = weight.layout.along_scales(weight.scale / wider, weight.q.ndim)
        weights[key] = replace(weight, q=(weight.q * ratio).round().short(), scale=wider)
    spacing = weights[key].output_scale * torch.tensor(scale, dtype=torch.float32, device=bias.device)
    return (bias / spacing).round().long(), spacing


def input_scale(graph: fx.Graph, weight: str) -> float:
    """Scale of the activations that meet the weight of this name."""
    return input_grid(graph, weight).scale


def input_grid(graph: fx.Graph, weight: str) -> ActivationGrid:
    """Grid of the activations that meet the weight of this name."""
    for node in graph.nodes:
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node) and node.args[1].target == weight:
            source = quantized_source(node.args[0])
            assert source is not None, f"the input of {weight} is not quantized"
            return grid_of(source)
    raise AssertionError(f"nothing takes {weight}")


def write_back(traced: Traced, weights: Mapping[str, IntegerWeight], biases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put the values that the integers stand for into the module; biases are those of `integer_bias`."""
    for key, weight in weights.items():
        _set(traced.module, key, weight.dequantize())
    for key, (integers, spacing) in biases.items():
        _set(traced.module, bias_name(key), integers.float() * spacing)
    for node in list(traced.module.graph.nodes):
        name = traced.weight_name(node)
        if name in biases:  # in the place of none, or of one that several layers share
            with traced.module.graph.inserting_before(node):
                node.args = (*node.args[:2], traced.module.graph.get_attr(bias_name(str(name))), *node.args[3:])


def bias_name(weight: str) -> str:
    """Name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def _set(module: fx.GraphModule, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
