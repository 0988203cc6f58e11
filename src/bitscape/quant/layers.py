"""Quantized layers: the torch layer, with a fake-quantizer on its input and one on its weight.

A layer becomes quantized by changing its class, in place: parameters, names, hooks and every reference to it stay as they are, so float
checkpoints still load, and a layer that is used twice stays one layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import QUANTIZABLE, output_channels, scale_axis
from bitscape.models.products import MatMul
from bitscape.policy import LayerBits
from bitscape.quant.quantizers import FakeQuantizer, PerChannel
from bitscape.quant.quantizers.base import scale_shape
from bitscape.quant.quantizers.lsq import LsqWeight

_QUANTIZERS = ("weight_quantizer", "input_quantizer")


class QuantizedLayer(nn.Module):
    """What the quantized layers share; `isinstance(layer, QuantizedLayer)` tells them."""

    weight: Tensor
    weight_quantizer: nn.Module
    input_quantizer: nn.Module


def static_bits(layer: QuantizedLayer) -> LayerBits:
    """Bit-widths of weight and input, the same for every image."""
    # No attribute of the layer: its own class may have one of any name.
    weight, activation = (cast(FakeQuantizer, q).bits for q in (layer.weight_quantizer, layer.input_quantizer))
    return LayerBits(int(weight), int(activation))


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """nn.Conv1d on a quantized input with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias))


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d on a quantized input with a quantized weight; depthwise and grouped ones too."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias))


class QuantConv3d(QuantizedLayer, nn.Conv3d):
    """nn.Conv3d on a quantized input with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias))


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear on a quantized input with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantMatMul(QuantizedLayer, MatMul):  # type: ignore[misc]  # it has no weight
    """The product of two quantized activations; the second's quantizer stands in the place of a weight's."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.input_quantizer(a), self.weight_quantizer(b))


def quantized_class(kind: type[nn.Module]) -> type[QuantizedLayer]:
    """The quantized form of a layer class.

    A subclass with a forward of its own (SAME padding, weight standardisation) keeps it: the forward finds the quantized weight under
    `self.weight` while it runs.

    Raises:
        BitscapeError: no layer type that takes bits.
    """
    for base, quantized in _QUANTIZED.items():
        if issubclass(kind, base):
            first = quantized if _has_forward_of(base, kind) else _OwnForward
            return quantized if kind is base else _derived(cast(Any, first), cast(Any, kind))
    allowed = ", ".join(k.__name__ for k in QUANTIZABLE)
    raise BitscapeError(f"layer of class {kind.__name__}: quantizable are {allowed} and their subclasses")


class _OwnForward(QuantizedLayer):
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _hiding(self, weight=self.weight_quantizer(self.weight)):
            return super().forward(self.input_quantizer(input), *args, **kwargs)


class QuantConvTranspose1d(_OwnForward, nn.ConvTranspose1d):
    """nn.ConvTranspose1d on a quantized input with a quantized weight; `output_size` as there."""


class QuantConvTranspose2d(_OwnForward, nn.ConvTranspose2d):
    """nn.ConvTranspose2d on a quantized input with a quantized weight; `output_size` as there."""


class QuantConvTranspose3d(_OwnForward, nn.ConvTranspose3d):
    """nn.ConvTranspose3d on a quantized input with a quantized weight; `output_size` as there."""


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    MatMul: QuantMatMul,
}


def _has_forward_of(base: type[nn.Module], kind: type[nn.Module]) -> bool:
    same = (getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
    return all(same)


@cache
def _derived(first: Any, kind: Any) -> type[QuantizedLayer]:
    return type(f"Quant{kind.__name__}", (first, kind), {"__reduce__": _reduced})


def _reduced(layer: nn.Module) -> tuple[Any, ...]:
    """What pickle stores: the class is made at run time, so no module has it under its name."""
    return _empty_layer, (type(layer).__bases__[1],), layer.__dict__


def _empty_layer(kind: type[nn.Module]) -> nn.Module:
    derived = quantized_class(kind)
    return cast(nn.Module, derived.__new__(derived))


def has_channel_scales(layer: QuantizedLayer) -> bool:
    """Whether the weight has one learned scale for each output channel."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, LsqWeight) or isinstance(quantizer.bits, Tensor):
        return False
    shape = scale_shape(layer.weight.shape, PerChannel(), scale_axis(layer))
    return quantizer.scale.shape == shape and quantizer.scale.numel() == output_channels(layer)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> quantized layer; a layer reachable by several names once, under its first."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}


def require_quantized(model: nn.Module, argument: str = "model") -> dict[str, QuantizedLayer]:
    """The quantized layers by name; raise BitscapeError where there is none."""
    layers = quantized_layers(model)
    if not layers:
        raise BitscapeError(
            f"{argument}: it has no quantized layer; "
            "call bitscape.quantize(model, policy, data) first"
        )
    return layers


def require_float(model: nn.Module, argument: str = "model") -> None:
    """Raise BitscapeError for a layer that is quantized already, by bitscape or by something else."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            raise BitscapeError(
                f"{argument}: its layer {name!r} is quantized already (it has its bits); give the float network"
            )
        if isinstance(layer, QUANTIZABLE) and (occupied := [key for key in _QUANTIZERS if hasattr(layer, key)]):
            raise BitscapeError(
                f"{argument}: its layer {name!r} ({type(layer).__name__}) has an attribute {occupied[0]} of its own, "
                "where bitscape puts its quantizer; rename it, or take it out if it quantizes the layer"
            )


def apply_layer(layer: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    """What `layer` computes from `input` with `weight` in place of its own and without bias: linear in both.

    Quantizers of a quantized layer are not applied; a forward of the layer's own (SAME padding) is.
    """
    float_class: Any = next(base for base in type(layer).__mro__ if not issubclass(base, QuantizedLayer))
    with _hiding(layer, weight=weight, bias=None):
        return cast(Tensor, float_class.forward(layer, input))


@contextmanager
def _hiding(layer: nn.Module, **values: Tensor | None) -> Iterator[None]:
    # An instance attribute hides the parameter of the same name, which lives in _parameters.
    layer.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del layer.__dict__[name]
