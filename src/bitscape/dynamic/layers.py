"""Quantized layers whose bits differ from image to image: a quantizer with its own scale for every width."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from bitscape.dynamic.widths import Widths, at_widths
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.quant.layers import QuantizedLayer, apply_layer
from bitscape.quant.observers import Observer
from bitscape.quant.quantizers import FakeQuantizer


class DynamicQuantizer(nn.Module):
    """One fake-quantizer for each width from `low` to `high`.

    Attributes:
        of_width: the fake-quantizers, least width first.
        widths: of the images of the next pass; set before it.
    """

    def __init__(self, make: Callable[[int], FakeQuantizer], low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.of_width = nn.ModuleList(make(bits) for bits in range(low, high + 1))
        self.widths: Widths | None = None

    def at(self, bits: int) -> FakeQuantizer:
        """The fake-quantizer of one width; BitscapeError for a width that there is none for."""
        if not self.low <= bits <= self.high:
            raise BitscapeError(f"{bits} bits: this layer has scales for {self.low} to {self.high} bits")
        return cast(FakeQuantizer, self.of_width[bits - self.low])

    def initialize(self, values: Tensor, observer: Observer) -> None:
        """Set the scale of every width, as FakeQuantizer.initialize does."""
        for quantizer in self.of_width:
            cast(FakeQuantizer, quantizer).initialize(values, observer)

    def widths_for(self, images: int) -> Widths:
        """The widths of a pass of that many images; BitscapeError where they were not set for it."""
        if self.widths is None or len(self.widths.below) != images:
            given = "none" if self.widths is None else len(self.widths.below)
            raise BitscapeError(f"widths: {given} for a batch of {images}; run the DynamicNetwork, which decides widths for each image")
        return self.widths

    def extra_repr(self) -> str:
        return f"bits={self.low}..{self.high}"


class DynamicActivation(DynamicQuantizer):
    """Quantizes each image of a layer's input (n, ...) at its own width."""

    def forward(self, x: Tensor) -> Tensor:
        return at_widths(x, self.widths_for(len(x)), lambda bits, images: cast(Tensor, self.at(bits)(images)))


class DynamicWeight(DynamicQuantizer):
    """A weight at each width; the layer asks for the one that a group of images needs."""

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return cast(Tensor, self.at(bits)(weight))


class DynamicWeightLayer(QuantizedLayer):
    """A layer that runs once for each weight width among the images of a batch."""

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        quantizer = cast(DynamicWeight, self.weight_quantizer)
        y = at_widths(x, quantizer.widths_for(len(x)), lambda bits, images: apply_layer(self, images, quantizer(self.weight, bits)))
        bias = cast(Tensor | None, self.bias)
        if bias is None:
            return y
        return y + (bias if isinstance(self, nn.Linear) else bias.view(-1, *(1,) * (y.ndim - 2)))


def make_weights_dynamic(layer: QuantizedLayer, make: Callable[[int], FakeQuantizer], low: int, high: int, observer: Observer) -> None:
    """Give a quantized layer a weight of every width, in place."""
    layer.weight_quantizer = DynamicWeight(make, low, high).to(layer.weight.device)
    layer.weight_quantizer.initialize(layer.weight.detach(), observer)
    layer.__class__ = _with_dynamic_weights(cast(Any, type(layer)))


@cache
def _with_dynamic_weights(kind: Any) -> type[QuantizedLayer]:
    return type(f"Dynamic{kind.__name__}", (DynamicWeightLayer, kind), {})


def make_static(layer: QuantizedLayer, bits: LayerBits) -> None:
    """Leave a layer one width for its weight and one for its input, in place: an ordinary quantized layer."""
    layer.input_quantizer = cast(DynamicActivation, layer.input_quantizer).at(bits.activation)
    if isinstance(layer, DynamicWeightLayer):
        layer.weight_quantizer = cast(DynamicWeight, layer.weight_quantizer).at(bits.weight)
        layer.__class__ = type(layer).__mro__[2]
