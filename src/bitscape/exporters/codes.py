"""The integers of a quantized layer's weight, checked to be the very values that the layer computes with."""

from dataclasses import replace

import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.models.layers import weight_layout
from bitscape.quant.grid import MID_RISE, grid
from bitscape.quant.layers import QuantizedLayer
from bitscape.quant.quantizers.base import Codes, PerChannel, WeightFakeQuantizer, scale_shape
from bitscape.quant.reference import quantize


class StoredWeight(torch.nn.Module):
    """The weight quantizer of a loaded network: the weight lies on its grid already and passes through."""

    scale: Tensor

    def __init__(self, bits: int, scale: Tensor, zero_point: float) -> None:
        super().__init__()
        self.bits = bits
        self.zero_point = zero_point
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """The integers, scales and zero point that the weight was stored as."""
        q = quantize(weight, self.scale, grid(self.bits, signed=True, mid_rise=self.zero_point == MID_RISE))
        return Codes(q.to(torch.int8), self.scale, self.zero_point)


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> Codes:
    """The codes of `layer`, one scale per output channel, (C, 1, ...) in most layers, or one for all (0-d).

    Raises:
        BitscapeError: bits that depend on the channel or image, weights that are not finite float32, or scales shared in
            another way.
    """
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightFakeQuantizer | StoredWeight) or isinstance(quantizer.bits, Tensor):
        raise BitscapeError("its weight quantizer has no codes of one bit-width; quantize with a static policy")
    codes, expected = quantizer.codes(layer.weight), quantizer(layer.weight)
    if expected.dtype != torch.float32 or not torch.equal(codes.dequantize(), expected):
        lost = int((~torch.isfinite(expected)).sum())
        raise BitscapeError(
            f"its weight cannot be stored as codes ({expected.dtype}, {lost} values NaN or infinite); allowed are "
            "finite float32 weights: look into the training, or call model.float()"
        )
    layout = weight_layout(layer)
    if codes.scale.ndim and codes.scale.shape != scale_shape(layer.weight.shape, PerChannel(), layout.scale_axis):
        shape = tuple(codes.scale.shape)
        raise BitscapeError(f"weight scales of shape {shape}; a file holds one per output channel or per tensor")
    return replace(codes, layout=layout)
