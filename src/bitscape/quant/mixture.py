"""A soft choice among candidate bit-widths: the quantized tensors are mixed, then the layer computes once.

    W_mix = sum_i p_i Q_i(W)      A_mix = sum_j q_j Q_j(A)      p = softmax(logits of the weight), q = softmax(logits of the input)

(Cai and Vasconcelos: "Rethinking differentiable search for mixed-precision neural networks", CVPR 2020, section 4.) Every
candidate has a learned scale of its own, with LSQ's gradient. In eager mode a hand-written autograd function saves its
input alone, whatever the number of candidates; codes are made again in the backward pass. Both passes walk once through
the tensor, for all candidates together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import scale_axis
from bitscape.models.products import refuse_products
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.functional import mixed
from bitscape.quant.grid import Grid, grid, grid_from
from bitscape.quant.layers import QuantizedLayer, quantized_layers
from bitscape.quant.observers import Mse, Observer, activation_range
from bitscape.quant.quantizers import FakeQuantizer
from bitscape.quant.quantizers.lsq import lsq_gradient_factor


class Mixture(FakeQuantizer):
    """The mix of a tensor quantized to every candidate width.

    Attributes:
        widths: candidate bits, R of them.
        logits: parameter (R,), what speaks for each candidate.
        price: buffer (R,), what speaks against it; softmax(logits - price) gives the shares. Zero unless set; infinity forbids.
        scale: parameter (R,) for one scale a tensor, or (R, C) for one a channel.
    """

    bits: Tensor

    def __init__(self, widths: Sequence[int], *, signed: bool, channels: int | None = None, channel_axis: int = 0) -> None:
        if not widths:
            raise BitscapeError("widths: none given; a mixture needs at least one candidate, e.g. (2, 4, 8)")
        grids = [grid(bits, signed=signed) for bits in widths]  # checks the bit-widths
        super().__init__(torch.tensor(widths), signed=signed)
        self.widths = tuple(widths)
        self._lowest_codes = [int(levels.qmin) for levels in grids]
        self.channel_axis = channel_axis
        self.logits = nn.Parameter(torch.zeros(len(widths), dtype=torch.float32))
        self.price: Tensor
        self.register_buffer("price", torch.zeros(len(widths), dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones((len(widths),) if channels is None else (len(widths), channels), dtype=torch.float32))

    @property
    def shares(self) -> Tensor:
        """Share of each candidate, (R,); differentiable."""
        return (self.logits - self.price).softmax(0)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Integer limits of each candidate."""
        return tuple(map(grid_from, self._lowest_codes, self.widths))

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        sharing = x.shape[self.channel_axis]  # images of a batch, or channels of a weight
        grids = self.grids
        scale: Tensor = self.scale
        if scale.ndim > 1:
            scale = scale.reshape(len(scale), *(n if axis == self.channel_axis else 1 for axis, n in enumerate(x.shape)))
        factors = tuple(lsq_gradient_factor(x.numel() // max(1, sharing), levels.qmax) for levels in grids)
        return mixed(x, scale, self.shares, grids, factors)

    def _set_range(self, values: Tensor, observer: Observer) -> None:
        if self.scale.ndim == 1:
            self.see_sign(values)
            ranges = [activation_range(values.flatten(), bits, observer) for bits in self.widths]
            self._lowest_codes = [int(levels.qmin) for _, levels in ranges]
            self.scale.copy_(torch.stack([scale for scale, _ in ranges]))
            return
        rows = values.movedim(self.channel_axis, 0).flatten(1)
        for scale, levels in zip(self.scale, self.grids, strict=True):
            scale.copy_(observer.scale(rows, levels))

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor(self._lowest_codes, dtype=torch.int32)])

    def set_extra_state(self, state: Tensor) -> None:
        of_all = len(state) - len(self.widths)
        super().set_extra_state(state[:of_all])
        self._lowest_codes = state[of_all:].tolist()

    def extra_repr(self) -> str:
        return f"bits={self.widths}, {'signed' if self.signed else 'unsigned'}"


def mix(
    model: nn.Module,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    groups: Sequence[Sequence[str]],
    pinned: Mapping[str, LayerBits],
) -> nn.Module:
    """Return a copy of the float network `model` with mixtures in the layers of `groups`; weight scales are set, `calibrate` sets the rest.

    Args:
        model: float network.
        weight_bits: candidate widths of the weights.
        activation_bits: candidate widths of the layers' inputs.
        groups: free layers; the layers of one group share their logits.
        pinned: bits of all the other layers.
    """
    refuse_products(model, "a search with mixtures of widths")
    widest = LayerBits(max(weight_bits), max(activation_bits))
    policy = Policy({**pinned, **{name: widest for group in groups for name in group}})
    network = with_quantizers(model, policy)
    layers = quantized_layers(network)
    for group in groups:
        _share_a_choice([layers[name] for name in group], weight_bits, activation_bits)
    return network


def _share_a_choice(layers: Sequence[QuantizedLayer], weight_bits: Sequence[int], activation_bits: Sequence[int]) -> None:
    of_weight: dict[tuple[Tensor, int], Mixture] = {}
    for layer in layers:
        key = layer.weight, scale_axis(layer)
        if key not in of_weight:
            mixture = Mixture(weight_bits, signed=True, channels=layer.weight.shape[key[1]], channel_axis=key[1])
            of_weight[key] = mixture.to(layer.weight.device)
            of_weight[key].initialize(layer.weight, Mse())
        layer.weight_quantizer = of_weight[key]
        layer.input_quantizer = Mixture(activation_bits, signed=False).to(layer.weight.device)
    for layer in layers[1:]:
        for name in ("weight_quantizer", "input_quantizer"):
            own, first = getattr(layer, name), getattr(layers[0], name)
            own.logits, own.price = first.logits, first.price
