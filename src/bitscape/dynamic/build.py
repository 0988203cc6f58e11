"""Making a DynamicNetwork of a float network."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from bitscape.cost.layers import NetworkProfile, measure
from bitscape.dynamic.heads import Head
from bitscape.dynamic.layers import DynamicActivation, make_weights_dynamic
from bitscape.dynamic.network import DynamicBits, DynamicNetwork, decide
from bitscape.errors import BitscapeError
from bitscape.models.layers import scale_axis
from bitscape.models.products import refuse_products
from bitscape.policy import Policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Lsq, Quantizer

_DEFAULT_QUANTIZER = Lsq()
_DEFAULT_BITS = DynamicBits()


def dynamic_network(
    model: nn.Module,
    policy: Policy,
    images: Tensor,
    bits: DynamicBits = _DEFAULT_BITS,
    quantizer: Quantizer = _DEFAULT_QUANTIZER,
) -> DynamicNetwork:
    """Quantize a float network with bits that each image decides.

    Args:
        model: float network; it is copied.
        policy: bits of every weight, and of the inputs of static layers.
        images: normalized float32 (n, c, h, w), a few hundred of the qualities to be met; they set scales and standardize features.
        bits: what images decide about.
        quantizer: how weights and activations are laid on their grids, with scales of its own for every width.

    Raises:
        BitscapeError: images that are not (n, c, h, w), no layer left to decide about, or a name in `static` that is not a layer.
    """
    network, cost = _with_dynamic_inputs(model, policy, tuple(images.shape[1:]), bits, quantizer)
    made = _wrapped(calibrate(network, images), cost, bits, quantizer)
    _standardize(made, images)
    return made


def unset_network(
    model: nn.Module,
    policy: Policy,
    input_shape: tuple[int, ...],
    bits: DynamicBits = _DEFAULT_BITS,
    quantizer: Quantizer = _DEFAULT_QUANTIZER,
) -> DynamicNetwork:
    """Build what `dynamic_network` returns, its scales not set: for a state dict of one."""
    network, cost = _with_dynamic_inputs(model, policy, input_shape, bits, quantizer)
    return _wrapped(network, cost, bits, quantizer)


def _with_dynamic_inputs(
    model: nn.Module, policy: Policy, input_shape: tuple[int, ...], bits: DynamicBits, quantizer: Quantizer
) -> tuple[nn.Module, NetworkProfile]:
    refuse_products(model, "a network of dynamic bits")
    network = with_quantizers(model, policy, quantizer)
    with bypassed(network):
        cost = measure(network, input_shape)
    _check_images(cost)
    static = cost.ends if bits.static is None else bits.static
    unknown = sorted(set(static) - set(cost.by_name))
    if unknown:
        raise BitscapeError(f"static: {', '.join(unknown)} is no layer that runs; layers are {', '.join(cost.by_name)}")
    if set(static) == set(cost.by_name):
        raise BitscapeError(f"static = {static}: every layer is static; leave at least one to decide about")
    for name, layer in quantized_layers(network).items():
        if name in cost.by_name and name not in static:
            layer.input_quantizer = DynamicActivation(quantizer.for_activation, bits.low, bits.high).to(layer.weight.device)
    return network, cost


def _check_images(cost: NetworkProfile) -> None:
    if len(cost.input_shape) != 3:
        first = cost.layers[0]
        raise BitscapeError(
            f"images: an input of shape {cost.input_shape}, to the {first.kind} layer {first.name}; bits follow the quality of images "
            "(n, c, h, w): give a network that takes those, or quantize this one with static bits (bitscape.quantize)"
        )


def _wrapped(network: nn.Module, cost: NetworkProfile, bits: DynamicBits, quantizer: Quantizer) -> DynamicNetwork:
    for layer in quantized_layers(network).values() if bits.weights else ():
        if isinstance(layer.input_quantizer, DynamicActivation):
            make = partial(quantizer.for_weight, layer.weight, channel_axis=scale_axis(layer))
            make_weights_dynamic(layer, make, bits.low, bits.high, Mse())
    return DynamicNetwork(network, cost, bits).to(next(network.parameters()).device)


@torch.no_grad()
def _standardize(network: DynamicNetwork, images: Tensor) -> None:
    heads = [cast(Head, head) for head in network.heads]
    seen: list[list[Tensor]] = [[] for _ in heads]
    hooks = [
        head.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
        for head, found in zip(heads, seen, strict=True)
    ]
    try:
        decide(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    for head, found in zip(heads, seen, strict=True):
        head.standardize(torch.cat(found))
