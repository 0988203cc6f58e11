"""A quantized network beside its float twin, and each layer of one in the place of the other's."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, nearest
from bitscape.models.copies import copied
from bitscape.models.layers import has_weight, quantizable_layers, weight_shape
from bitscape.models.prepare import prepare
from bitscape.models.products import products
from bitscape.quant.fold import fold_norms
from bitscape.quant.layers import QuantizedLayer, quantized_layers, require_float
from bitscape.quant.quantizers import FakeQuantizer

Part = Literal["both", "weight", "input"]
"""What of a layer is quantized. Of a product of two activations, "weight" is its second operand."""


@dataclass(frozen=True)
class Twins:
    """A quantized network and its float twin, whose layers have the same names."""

    network: nn.Module
    """Quantized, calibrated."""
    twin: nn.Module
    """The same in float."""
    layers: Mapping[str, QuantizedLayer]
    """Name -> quantized layer."""
    exact: Mapping[str, nn.Module]
    """Name -> the same layer of the twin."""

    @classmethod
    def of(cls, network: nn.Module, reference: nn.Module | None, samples: Samples) -> "Twins":
        """Pair a quantized network with the float network that it was made of.

        Args:
            network: quantized and calibrated.
            reference: float network; its norms are folded where those of `network` are. None: the
                weights of `network` before its quantizers are the float ones.
            samples: what the network is called with, to fold norms.

        Raises:
            BitscapeError: bits that depend on the image or are still searched; a reference that has
                other layers; weights that lie on their grids already, without a reference.
        """
        layers = quantized_layers(network)
        _check_bits(layers)
        if reference is None:
            _check_latent(layers)
            twin = copied(network)
            for layer in quantized_layers(twin).values():
                layer.weight_quantizer, layer.input_quantizer = nn.Identity(), nn.Identity()
        else:
            twin = _like(network, reference, samples)
        exact = quantizable_layers(twin)
        for name, layer in layers.items():
            if name not in exact or weight_shape(exact[name]) != weight_shape(layer):
                raise BitscapeError(
                    f"reference: it has no layer {name!r} of shape {weight_shape(layer)}"
                    f"{nearest(name, exact)}; give the float network that was quantized"
                )
        return cls(network, twin, layers, exact)

    @contextmanager
    def quantized_in_twin(self, part: Part, *names: str) -> Iterator[nn.Module]:
        """Within the block the named layers of the float twin are quantized; yields the twin."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(standing_in(self.exact[name], self.half(name, part)))
            yield self.twin

    @contextmanager
    def exact_in_network(self, *names: str) -> Iterator[nn.Module]:
        """Within the block the named layers of the network are float; yields the network."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(standing_in(self.layers[name], self.exact[name]))
            yield self.network

    def half(self, name: str, part: Part) -> nn.Module:
        """Return the quantized layer, of which only `part` is quantized and all else float."""
        layer = self.layers[name]
        if part == "both":
            return layer
        half = copy.copy(layer)
        float_part = "input_quantizer" if part == "weight" else "weight_quantizer"
        half.__dict__["_modules"] = {**layer._modules, float_part: nn.Identity()}
        if part == "input":
            half.__dict__["_parameters"] = self.exact[name]._parameters
        return half


@contextmanager
def standing_in(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Within the block `layer` is `other` wherever a network holds it, hooks included."""
    kind, state = layer.__class__, layer.__dict__
    layer.__class__, layer.__dict__ = other.__class__, other.__dict__
    try:
        yield
    finally:
        layer.__class__, layer.__dict__ = kind, state


def _like(network: nn.Module, reference: nn.Module, samples: Samples) -> nn.Module:
    """A copy of the float network with attention split and norms folded as in `network`."""
    require_float(reference, "reference")
    twin = prepare(reference, attention_products=bool(products(network)))
    if _norms(twin) != _norms(network):
        twin = fold_norms(twin, samples.first(2), inplace=True)
    if _norms(twin) != _norms(network):
        raise BitscapeError(
            "reference: its norms are not those of the quantized network; give the float network "
            "that was quantized, or leave reference out"
        )
    return twin


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _check_bits(layers: Mapping[str, QuantizedLayer]) -> None:
    for name, layer in layers.items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if not isinstance(quantizer, FakeQuantizer) or not isinstance(quantizer.bits, int):
                raise BitscapeError(
                    f"network: the bits of its layer {name!r} depend on the image, or are still "
                    "searched; analyze the float network at the bits of a policy instead"
                )


@torch.no_grad()
def _check_latent(layers: Mapping[str, QuantizedLayer]) -> None:
    weighted = [layer for layer in layers.values() if has_weight(layer)]
    if weighted and all(
        torch.equal(layer.weight_quantizer(layer.weight), layer.weight) for layer in weighted
    ):
        raise BitscapeError(
            "network: its weights lie on their grids already, as after repair or in a packed file, "
            "so their noise is unknown; pass reference=, the float network that was quantized"
        )
