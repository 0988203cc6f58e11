"""A quantized network as its training sees it: codes and scales apart, and a rate for every parameter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.layers import has_weight
from bitscape.models.modes import evaluating
from bitscape.quant.chains import shared_parameters
from bitscape.quant.functional import round_ste
from bitscape.quant.layers import QuantizedLayer, quantized_layers
from bitscape.quant.quantizers.base import Codes, FakeQuantizer
from bitscape.quant.quantizers.lsq import LsqWeight

_BETAS = (0.9, 0.99)
"""Of Adam: some hundred steps are too few for a longer memory."""
_EPSILON = 1e-12
"""Of Adam: gradients of scales carry LSQ's factor and may be small."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates, each in units of what it moves."""

    scales: float
    """Of scales, biases and norms: a share of their size a step."""
    codes: float
    """Of the weights: codes a step."""


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
        self._quantizers = {
            layer: layer.weight_quantizer for layer in _trainable_weights(model)
        }
        self._units = _units_of_vectors(model, example)
        for layer, quantizer in self._quantizers.items():
            layer.weight_quantizer = CodesAndScales(layer, quantizer)

    def optimizer(self, part: nn.Module, rates: Rates) -> torch.optim.Optimizer:
        """Return Adam over what is trained of `part`, a module of the network; all else is frozen."""
        self.model.requires_grad_(False)
        groups = [group for group in self._groups(part, rates) if group["lr"] > 0]
        for group in groups:
            group["params"][0].requires_grad_(True)
        return torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)

    def _groups(self, part: nn.Module, rates: Rates) -> Iterator[dict[str, Any]]:
        for module in part.modules():
            if isinstance(module, CodesAndScales):
                yield {"params": [module.growth], "lr": rates.scales}
                yield {"params": [module.position], "lr": rates.codes}
            elif isinstance(module, FakeQuantizer) and not isinstance(module, LsqWeight):
                yield from _of_activation(module, rates.scales)
            for parameter in module.parameters(recurse=False):
                if parameter in self._units:
                    yield {"params": [parameter], "lr": rates.scales * self._units[parameter]}

    @torch.no_grad()
    def settle(self) -> None:
        """Give the layers their own quantizers back, with the codes and scales at hand."""
        for layer, quantizer in self._quantizers.items():
            trained: Any = layer.weight_quantizer
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


def _trainable_weights(model: nn.Module) -> Iterable[QuantizedLayer]:
    layers = quantized_layers(model)
    if not layers:
        raise BitscapeError(
            "model: it has no quantized layer; call bitscape.quantize(model, policy, data) first"
        )
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
        yield layer


def _of_activation(quantizer: FakeQuantizer, rate: float) -> Iterator[dict[str, Any]]:
    """The scale moves by a share of itself, an offset by the same share of the range."""
    scale = float(quantizer.get_parameter("scale").detach().abs())
    levels = float(quantizer.grid.qmax) - float(quantizer.grid.qmin)
    for name, parameter in quantizer.named_parameters(recurse=False):
        yield {"params": [parameter], "lr": rate * scale * (1.0 if name == "scale" else levels)}


def _units_of_vectors(model: nn.Module, example: Inputs) -> dict[nn.Parameter, float]:
    """Biases and factors of layers and norms -> what size they have.

    Of a bias that is the spread of its module's outputs, of others the root mean square of their values.
    """
    units: dict[nn.Parameter, float] = {}
    handles = []

    def see(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            units[module.get_parameter("bias")] = float(output.float().std())

    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 1:
                continue
            units[parameter] = float(parameter.detach().square().mean().sqrt())
            if name == "bias":
                handles.append(module.register_forward_hook(see))
    try:
        with evaluating(model), explained_forward(example):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return units
