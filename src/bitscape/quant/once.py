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

    has_graph: bool
    by_quantizer: dict[FakeQuantizer, list[_Result]] = field(default_factory=dict)

    def of(self, quantizer: FakeQuantizer, weight: Tensor) -> Tensor:
        """The quantized weight, made at the first call.

        It is the same wherever that call stands: in a part without gradients, or in one that saves no
        tensors (`torch.utils.checkpoint`).
        """
        results = self.by_quantizer.setdefault(quantizer, [])
        known = next((one for one in results if one.weight is weight), None)
        if known is None:
            saved_as_they_are = torch.autograd.graph.saved_tensors_hooks(_same, _same)
            with torch.set_grad_enabled(self.has_graph), saved_as_they_are:
                quantized = quantizer.quantized(weight)
            leaf = quantized.detach()
            if quantized.requires_grad:
                leaf.requires_grad_()
            known = _Result(weight, quantized, leaf)
            results.append(known)
        return known.leaf

    def pass_on(self) -> None:
        """Let gradients that came since the last call go on to weights and scales."""
        every = [one for results in self.by_quantizer.values() for one in results]
        reached = [one for one in every if one.leaf.grad is not None]
        if reached:
            gradients = [one.leaf.grad for one in reached]
            torch.autograd.backward(
                [one.quantized for one in reached], gradients, retain_graph=True
            )
        for one in reached:
            one.leaf.grad = None


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Within the block each weight is quantized at its first use, and later passes take the same result.

    Gradients of all passes add up, and reach weights and scales when the block ends; until then,
    weights are no part of the graph. Neither may change within the block. A block within a block takes
    its results from the outer one, and passes gradients on when it ends. Compiled networks quantize in
    every pass, since the compiler fuses it with the rest.
    """
    quantizers = [
        module
        for layer in quantized_layers(model).values()
        if has_weight(layer)
        for module in layer.weight_quantizer.modules()
        if isinstance(module, FakeQuantizer)
    ]
    before = [quantizer.results for quantizer in quantizers]
    outer = next((results for results in before if results is not None), None)
    results = Results(torch.is_grad_enabled()) if outer is None else outer
    for quantizer in quantizers:
        quantizer.results = results
    try:
        yield
        results.pass_on()
    finally:
        for quantizer, earlier in zip(quantizers, before, strict=True):
            quantizer.results = earlier
