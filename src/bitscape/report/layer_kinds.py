"""Kinds of layers, as the figures of a report color them."""

from bitscape.cost.layers import LayerCost

PRODUCT = "product of activations"
UNKNOWN = "layer"
"""Kind of every layer where no network was given."""


def kind_of(layer: LayerCost) -> str:
    """Return what a layer is called in a legend: "1×1 convolution", "depthwise convolution", ..."""
    if layer.weight_shape == (0,):
        return PRODUCT
    if layer.kind == "Linear":
        return "linear layer"
    if layer.kind.startswith("ConvTranspose"):
        return "transposed convolution"
    if layer.groups > 1:
        return "depthwise convolution" if layer.weight_shape[1] == 1 else "grouped convolution"
    kernel = layer.weight_shape[2:]
    return "1×1 convolution" if set(kernel) == {1} else "convolution"
