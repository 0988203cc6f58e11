"""A fake-quantizer for every candidate width, of which one is in use.

All widths share the weight; each has a scale of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from bitscape.models.layers import has_weight, scale_axis
from bitscape.policy import LayerBits
from bitscape.quant.layers import QuantizedLayer, quantized_layers
from bitscape.quant.observers import Mse, Observer
from bitscape.quant.quantizers import FakeQuantizer, Lsq


class Switched(nn.Module):
    """Quantizes to the width in use.

    Attributes:
        of_width: bits, as text -> the fake-quantizer of that width.
        bits: the width in use, at first the widest.
    """

    def __init__(self, make: Callable[[int], FakeQuantizer], widths: Sequence[int]) -> None:
        super().__init__()
        self.of_width = nn.ModuleDict({str(bits): make(bits) for bits in widths})
        self.bits = max(widths)

    def at(self, bits: int) -> FakeQuantizer:
        """The fake-quantizer of one width."""
        return cast(FakeQuantizer, self.of_width[str(bits)])

    def initialize(self, values: Tensor, observer: Observer) -> None:
        """Set the scale of every width, as FakeQuantizer.initialize does."""
        for quantizer in self.of_width.values():
            cast(FakeQuantizer, quantizer).initialize(values, observer)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the width in use."""
        return cast(Tensor, self.at(self.bits)(x))

    def extra_repr(self) -> str:
        return f"bits={self.bits} of {', '.join(self.of_width)}"


def make_switched(
    model: nn.Module,
    layers: Iterable[str],
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
) -> None:
    """Give quantized layers of `model` a quantizer for every width, in place.

    Layers of one weight share its quantizer.
    Weight scales are set; `calibrate` sets those of activations.
    """
    quantizer, of_weight = Lsq(), dict[tuple[Tensor, int], Switched]()
    by_name = quantized_layers(model)
    for layer in (by_name[name] for name in layers):
        device = next(layer.parameters()).device
        layer.input_quantizer = Switched(quantizer.for_activation, activation_bits).to(device)
        if not has_weight(layer):  # a product: the second operand is an activation, too
            layer.weight_quantizer = Switched(quantizer.for_activation, weight_bits).to(device)
            continue
        key = weight, axis = layer.weight, scale_axis(layer)
        if key not in of_weight:
            of_weight[key] = Switched(
                partial(quantizer.for_weight, weight, channel_axis=axis), weight_bits
            )
            of_weight[key].to(device).initialize(weight, Mse())
        layer.weight_quantizer = of_weight[key]


def use_bits(layer: QuantizedLayer, bits: LayerBits) -> None:
    """Switch both quantizers of a layer to a pair of widths."""
    cast(Switched, layer.weight_quantizer).bits = bits.weight
    cast(Switched, layer.input_quantizer).bits = bits.activation
