"""torchao: a `FqnToConfig` that quantizes each layer at its bits.

    from torchao.quantization import quantize_

    quantize_(model, adapters.to_torchao(policy, model), filter_fn=None)

torchao rounds the float network itself, to the nearest code: the policy gives the widths alone. A
linear layer gets weights of 1 to 8 bits with one scale a row, beside inputs of 8 bits whose range
is found at run time. A convolution in two dimensions gets weights alone, with a scale for each
output and position of the kernel; its input stays float. Depthwise convolutions and other layers
stay float: torchao 0.18 has nothing for them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from bitscape.adapters.widths import FLOAT, Pair, Rounding, offered_bits
from bitscape.errors import BitscapeError, needs_extra
from bitscape.models.layers import layer_shapes, quantizable_layers
from bitscape.policy import FLOAT_BITS, WEIGHT_BITS, Policy

NAME = "torchao"


def to_torchao(policy: Policy, model: nn.Module, *, rounding: Rounding = "exact") -> Any:
    """Return the policy as a `FqnToConfig` of torchao (extra "torchao").

    Args:
        policy: bits of every layer.
        model: the float network; the kinds of its layers decide what torchao has for them.
        rounding: of widths that torchao lacks: "exact" raises an error, "up" takes the next wider
            ones, float at last.

    Raises:
        PolicyError: a policy of another network.
        BitscapeError: the package is missing, a layer that is no module of `model`, or widths that
            torchao lacks.
    """
    policy.check(layer_shapes(model))
    layers = quantizable_layers(model)
    if unknown := [name for name in policy.layers if name not in layers]:
        raise BitscapeError(
            f"layer {unknown[0]!r}: it is part of an nn.MultiheadAttention, which torchao "
            "quantizes as a whole or not at all; keep the attention's layers float"
        )
    pairs = offered_bits(
        policy, {name: _offered(layers[name]) for name in policy.layers}, rounding, NAME
    )
    with needs_extra("torchao"):
        library = import_module("torchao.quantization")
    configs = ((name, _config(library, pair)) for name, pair in pairs.items())
    return library.FqnToConfig(fqn_to_config=OrderedDict(configs))


def torchao_document(config: Any) -> Any:
    """Return a config as torchao writes it to JSON; its function config_from_dict reads it."""
    return import_module("torchao.core.config").config_to_dict(config)


def _offered(layer: nn.Module) -> Sequence[Pair]:
    if isinstance(layer, nn.Linear):
        return [*((bits, 8) for bits in WEIGHT_BITS), FLOAT]
    if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] > 1:
        return [*((bits, FLOAT_BITS) for bits in WEIGHT_BITS), FLOAT]
    return [FLOAT]


def _config(library: Any, pair: Pair) -> Any:
    if pair == FLOAT:
        return None
    weight, activation = pair
    dtype, by_row = getattr(torch, f"int{weight}"), library.PerAxis(0)
    if activation == FLOAT_BITS:
        return library.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=by_row)
    return library.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=by_row
    )
