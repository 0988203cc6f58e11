"""What every quantizer shares: the fake-quantizer module, its codes, and how scales are shared within a tensor.

A quantizer is a frozen setting with two functions, `for_weight(weight, bits)` and `for_activation(bits)`, that build
`FakeQuantizer` modules.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import PLAIN, WeightLayout
from bitscape.policy import MAX_BITS
from bitscape.quant.functional import MINIMUM_SCALE, at_least, fake_quantize, require_finite, without_autocast
from bitscape.quant.grid import Grid, grid, grid_from
from bitscape.quant.observers import Observer
from bitscape.quant.reference import dequantize, quantize, widened

if TYPE_CHECKING:
    from bitscape.quant.once import Results


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axis`; None: of the layer's output channels, as `models.layers.scale_axis` says."""

    axis: int | None = None


Sharing = PerTensor | PerChannel


def scale_shape(shape: torch.Size, sharing: Sharing, channel_axis: int = 0) -> tuple[int, ...]:
    """Shape of the scales of a tensor of `shape`: () or broadcastable with one axis kept, by default `channel_axis`."""
    if isinstance(sharing, PerTensor):
        return ()
    kept = channel_axis if sharing.axis is None else sharing.axis
    return tuple(n if axis == kept else 1 for axis, n in enumerate(shape))


def grouped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` as (groups, n): one row of values for each scale of `shape`."""
    axis = next((i for i, n in enumerate(shape) if n > 1), None)
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


@dataclass(frozen=True)
class Codes:
    """A quantized weight as integers: real = scale * (q - zero_point).

    `q` is int8 in the weight's shape; `scale` float32, 0-d or with one axis of it, (C, 1, ...);
    `zero_point` 0 or -1/2 (mid-rise).
    """

    q: Tensor
    scale: Tensor
    zero_point: float
    layout: WeightLayout = PLAIN
    """Where the layer's outputs lie in `q`."""

    def dequantize(self) -> Tensor:
        """The real values, bit for bit those of the fake-quantizer's forward pass."""
        return dequantize(self.q.float(), self.scale, self.zero_point)


class FakeQuantizer(nn.Module, ABC):
    """Quantizes and dequantizes a tensor; built by a quantizer's `for_weight` or `for_activation`.

    Attributes:
        bits: bit-width 1..8, of activations also 16, or a tensor of them that broadcasts against the data.
        signed: whether codes below zero exist. For activations decided by the values seen in `initialize`.
        lowest: the smallest code, where the grid lies between the signed and the unsigned one; else None.
        initialized: whether scales were set; calling it earlier is an error.
        results: within a block of `weights_quantized_once`, where quantized weights are kept.
    """

    is_fake_quantizer: Final = True

    def __init__(self, bits: int | Tensor, *, signed: bool, mid_rise: bool = False) -> None:
        super().__init__()
        grid(bits, signed=signed)  # checks the bit-width
        self.bits = bits
        self.signed = signed
        self.lowest: int | None = None
        self.mid_rise = mid_rise
        self.initialized = False
        self.results: Results | None = None
        self._grid: Grid | None = None

    @property
    def grid(self) -> Grid:
        """Integer limits for the present bits, sign and zero point."""
        if self._grid is None:
            if self.lowest is None:
                self._grid = grid(self.bits, signed=self.signed, mid_rise=self.mid_rise)
            else:
                self._grid = grid_from(self.lowest, int(self.bits))
        return self._grid

    @abstractmethod
    def _quantize_dequantize(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _set_range(self, values: Tensor, observer: Observer) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.results is not None:
            return self.results.of(self, x)
        return self.quantized(x)

    def quantized(self, x: Tensor) -> Tensor:
        """The values of the grid nearest to `x`, in its shape and type."""
        self._require_scale()
        return self._quantize_dequantize(x)

    def _require_scale(self) -> None:
        if not self.initialized:
            raise BitscapeError(
                "a fake-quantizer was called before its scale was set: call bitscape.quantize(model, policy, data), which sets it"
            )

    @torch.no_grad()
    @without_autocast()
    def initialize(self, values: Tensor, observer: Observer) -> None:
        """Set scales from `values`: the weight itself, or a sample of activations of any shape.

        Raises:
            BitscapeError: values that are not finite.
        """
        require_finite(values)
        self._set_range(values.detach().float(), observer)
        self.initialized = True

    def see_sign(self, values: Tensor) -> None:
        """Let the values decide whether codes below zero are needed."""
        self.signed = bool(values.min() < 0)
        self._grid = None

    def use(self, levels: Grid) -> None:
        """Take the grid that `activation_range` chose."""
        self.signed = bool((torch.as_tensor(levels.qmin) < 0).any())
        plain = isinstance(self.bits, Tensor) or levels == grid(self.bits, signed=self.signed)
        self.lowest = None if plain else int(levels.qmin)
        self._grid = levels

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are outside of any block."""
        return {**self.__dict__, "results": None}

    # What is no tensor travels with the state dict as one, so that nothing has to be unpickled.
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.signed, self.initialized, self.lowest or 0], dtype=torch.int32)

    def set_extra_state(self, state: Tensor) -> None:
        signed, initialized, lowest = state.tolist()
        self.signed, self.initialized, self.lowest = bool(signed), bool(initialized), lowest or None
        self._grid = None

    def extra_repr(self) -> str:
        bits = "per element" if isinstance(self.bits, Tensor) else self.bits
        codes = "unsigned" if not self.signed else "signed" if self.lowest is None else f"from {self.lowest}"
        return f"bits={bits}, {codes}"


class WeightFakeQuantizer(FakeQuantizer):
    """A fake-quantizer whose result can be stored as codes: transform, then the grid.

    Forward is `fake_quantize(transform(w), grid_scale())`; `codes` walks the same arithmetic, so both agree bit for bit.
    """

    gradient_factor: float = 1.0

    def __init__(self, bits: int | Tensor, *, signed: bool, mid_rise: bool = False) -> None:
        super().__init__(bits, signed=signed, mid_rise=mid_rise)
        if not isinstance(bits, Tensor) and bits > MAX_BITS:
            raise BitscapeError(f"bits = {bits}: weights take 1 to {MAX_BITS} bits; only activations take 16")

    @abstractmethod
    def transform(self, weight: Tensor) -> Tensor:
        """What is laid on the grid, in the weight's shape."""

    @abstractmethod
    def _spacing(self, weight: Tensor) -> Tensor: ...

    def grid_scale(self, weight: Tensor) -> Tensor:
        """Spacing of the grid for the transformed weight, at least MINIMUM_SCALE."""
        return at_least(self._spacing(weight), MINIMUM_SCALE)

    def _quantize_dequantize(self, x: Tensor) -> Tensor:
        wide = widened(x)
        y = fake_quantize(self.transform(wide), self.grid_scale(wide), self.grid, scale_gradient_factor=self.gradient_factor)
        return y.to(x.dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """The integers, scales and zero point of `weight`; needs integer bits."""
        self._require_scale()
        weight = widened(weight)
        scale = self.grid_scale(weight).detach().clone()
        q = quantize(self.transform(weight), scale, self.grid)
        return Codes(q.to(torch.int8), scale, float(self.grid.zero_point))
