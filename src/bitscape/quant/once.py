"""Weights that do not change for a while are quantized once, not in every pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitscape.models.layers import has_weight
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import FakeQuantizer


@dataclass
class _Result:
    """A quantized weight."""

    weight: Tensor
    quantized: Tensor
    """With the graph that leads to the weight."""
    leaf: Tensor
    """The same values, on which the passes leave their gradients."""


@dataclass
class Results:
    """What quantizers made of their weights since a block of `weights_quantized_once` began."""

    by_quantizer: dict[FakeQuantizer, list[_Result]] = field(default_factory=dict)

    def of(self, quantizer: FakeQuantizer, weight: Tensor) -> Tensor:
        """The quantized weight, made at the first call."""
        results = self.by_quantizer.setdefault(quantizer, [])
        known = next((one for one in results if one.weight is weight), None)
        if known is None:
            quantized = quantizer.quantized(weight)
            leaf = quantized.detach().requires_grad_(quantized.requires_grad)
            known = _Result(weight, quantized, leaf)
            results.append(known)
        return known.leaf

    def pass_on(self) -> None:
        """Let gradients that came since the last call go on to weights and scales."""
        each = [one for results in self.by_quantizer.values() for one in results if one.leaf.grad is not None]
        if each:
            gradients = [one.leaf.grad for one in each]
            torch.autograd.backward([one.quantized for one in each], gradients, retain_graph=True)
        for one in each:
            one.leaf.grad = None


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Within the block each weight is quantized at its first use, and later passes take the same result.

    Gradients of all passes add up, and reach weights and scales when the block ends. Neither may change
    within it. A block within a block takes its results from the outer one. Compiled networks quantize
    in every pass, since the compiler fuses it with the rest.
    """
    quantizers = [
        module
        for layer in quantized_layers(model).values()
        if has_weight(layer)
        for module in layer.weight_quantizer.modules()
        if isinstance(module, FakeQuantizer)
    ]
    outer = next((quantizer.results for quantizer in quantizers if quantizer.results is not None), None)
    results = Results() if outer is None else outer
    for quantizer in quantizers:
        quantizer.results = results
    try:
        yield
        results.pass_on()
    finally:
        if outer is None:
            for quantizer in quantizers:
                quantizer.results = None
