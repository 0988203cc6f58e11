"""A quantized network as its training sees it: codes and scales apart, and how far each parameter may come."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.layers import has_weight
from bitscape.models.modes import evaluating
from bitscape.policy import MAX_BITS
from bitscape.quant.chains import shared_parameters
from bitscape.quant.functional import round_ste
from bitscape.quant.grid import Grid, grid
from bitscape.quant.layers import QuantizedLayer, require_quantized
from bitscape.quant.quantizers.base import Codes, FakeQuantizer
from bitscape.quant.quantizers.lsq import LsqWeight

_BETAS = (0.9, 0.99)
"""Of Adam: some hundred steps are too few for a longer memory."""
_EPSILON = 1e-12
"""Of Adam: gradients of scales carry LSQ's factor and may be small."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a parameter comes that moves the same way in every step of the run, in codes; under Adam none comes further."""

    scales: float
    """Of scales, biases and norms: how far they move the outermost value of their grid, above 0."""
    codes: float
    """Of weights, at least 0: below 1/2 none changes."""

    def __post_init__(self) -> None:
        """Check both fields."""
        if not (0 < self.scales < math.inf and 0 <= self.codes < math.inf):
            raise BitscapeError(
                f"scales = {self.scales}, codes = {self.codes}: scales are above 0, codes at least 0"
            )


class CodesAndScales(nn.Module):
    """In the place of a weight's quantizer: the weight as codes, which move and are rounded, times scales, which grow.

    Codes keep their values while scales change; a weight beside a moving grid would not.
    """

    def __init__(self, layer: QuantizedLayer, quantizer: LsqWeight) -> None:
        super().__init__()
        codes = quantizer.codes(layer.weight)
        self.bits, self.grid, self.layout = quantizer.bits, quantizer.grid, codes.layout
        self.zero_point = codes.zero_point
        self.register_buffer("start", codes.scale)
        self.growth = nn.Parameter(torch.zeros_like(codes.scale))
        """Logarithm of each scale over its start."""
        self.position = nn.Parameter(codes.q.to(codes.scale.dtype))
        """Codes before rounding; they start in the middle of their bins."""

    def codes(self) -> Tensor:
        """The codes, with a straight-through gradient for the position."""
        return round_ste(self.position).clamp(float(self.grid.qmin), float(self.grid.qmax))

    def scale(self) -> Tensor:
        """The scales."""
        return self.get_buffer("start") * self.growth.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight; the layer's own is not looked at."""
        return (self.codes() - self.zero_point) * self.scale()


class Relaxed:
    """What can be trained of a quantized network, and in which unit.

    Codes and scales of weights, scales and offsets of activations, biases, and the vectors of norms. Weights that
    several layers share stay as they are.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self.model = model
        self._quantizers = dict(_trainable_weights(model))
        self._sizes = _sizes_of_vectors(model, example)
        for layer, quantizer in self._quantizers.items():
            layer.weight_quantizer = CodesAndScales(layer, quantizer)

    def optimizer(self, part: nn.Module, reach: Reach, steps: int) -> torch.optim.Optimizer:
        """Return Adam over what is trained of `part`, a module of the network; all else is frozen.

        It reaches so far in that many steps of rates that fall by a half cosine.
        """
        self.model.requires_grad_(False)
        groups = list[dict[str, Any]]()
        for parameter, way in self._ways(part, reach):
            if way > 0:
                parameter.requires_grad_(True)
                groups.append({"params": [parameter], "lr": 2 * way / steps})
        return torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)

    def _ways(self, part: nn.Module, reach: Reach) -> Iterator[tuple[nn.Parameter, float]]:
        """Each parameter of `part` that is trained, and how far it reaches."""
        for module in part.modules():
            if isinstance(module, CodesAndScales):
                yield module.growth, reach.scales / outermost(module.grid)
                yield module.position, reach.codes
            elif isinstance(module, FakeQuantizer) and not isinstance(module, LsqWeight):
                scale = float(module.get_parameter("scale").detach().abs())
                for name, parameter in module.named_parameters(recurse=False):
                    step = scale / outermost(module.grid) if name == "scale" else scale
                    yield parameter, reach.scales * step
            for parameter in module.parameters(recurse=False):
                if parameter in self._sizes:
                    size = self._sizes[parameter]
                    yield parameter, reach.scales * size / outermost(_grid_of(module))

    @torch.no_grad()
    def settle(self) -> None:
        """Give the layers their own quantizers back, with the codes and scales at hand."""
        for layer, quantizer in self._quantizers.items():
            trained = cast(CodesAndScales, layer.weight_quantizer)
            layer.weight_quantizer = quantizer
            quantizer.scale.copy_(trained.scale())
            codes = trained.codes().to(torch.int8)
            scale = quantizer.grid_scale(layer.weight)
            layer.weight.copy_(Codes(codes, scale, trained.zero_point, trained.layout).dequantize())


@contextmanager
def relaxed(model: nn.Module, example: Inputs) -> Iterator[Relaxed]:
    """Within the block the network is in the form that is trained; afterwards in its own, as far as it came.

    Args:
        model: quantized by LSQ or LSQ+, calibrated.
        example: inputs of a few samples, which show how large outputs are.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]
    relaxation = Relaxed(model, example)
    try:
        yield relaxation
    finally:
        relaxation.settle()
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)


def _trainable_weights(model: nn.Module) -> Iterator[tuple[QuantizedLayer, LsqWeight]]:
    layers = require_quantized(model)
    shared = shared_parameters(model)
    for name, layer in layers.items():
        if not has_weight(layer) or layer.weight in shared:
            continue
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, LsqWeight) or isinstance(quantizer.bits, Tensor):
            raise BitscapeError(
                f"layer {name}: its weight quantizer is {type(quantizer).__name__}; "
                "tuning needs Lsq or LsqPlus with one width a layer"
            )
        yield layer, quantizer


def outermost(levels: Grid) -> float:
    """The largest level of a grid, in scales."""
    ends = levels.qmax - levels.zero_point, levels.qmin - levels.zero_point
    return max(abs(float(end)) for end in ends)


def _grid_of(module: nn.Module) -> Grid:
    """That of a layer's weight, which tells how exact its outputs are; of norms that of 8 bits."""
    trained = getattr(module, "weight_quantizer", None)
    return trained.grid if isinstance(trained, CodesAndScales) else grid(MAX_BITS, signed=True)


def _sizes_of_vectors(model: nn.Module, example: Inputs) -> dict[nn.Parameter, float]:
    """Biases and factors of layers and norms -> what size they have.

    Of a bias that is the spread of its module's outputs, of others the root mean square of their values.
    """
    sizes: dict[nn.Parameter, float] = {}
    handles = []

    def see(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes[module.get_parameter("bias")] = float(output.float().std())

    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 1:
                continue
            sizes[parameter] = float(parameter.detach().square().mean().sqrt())
            if name == "bias":
                handles.append(module.register_forward_hook(see))
    try:
        with evaluating(model), explained_forward(example):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
