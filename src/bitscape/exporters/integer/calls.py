"""Layers that run several times, as shared heads do: in integer form every call is a layer of its own.

The norm behind a call, the scale of its input, and so its weight scales and integer bias, may differ from those of other calls. The codes
are the same, and files store equal constants once.
"""

from dataclasses import replace
from itertools import count

from torch import fx, nn

from bitscape.exporters.integer.graph import Traced, layer_of


def separate_calls(traced: Traced) -> tuple[Traced, dict[str, str]]:
    """Give every call of a layer but the first a weight of its own, named after the layer with ":2", ":3" and so on.

    Returns:
        The network in which every quantized weight has one user, and for each name of a weight the layer that it belongs to.
    """
    codes, bits = dict(traced.codes), dict(traced.bits)
    layers: dict[str, str] = {}
    for node in list(traced.module.graph.nodes):
        if (key := traced.weight_name(node)) is None:
            continue
        name = key
        if key in layers:
            name = _add_weight(traced.module, node, key)
            codes[name], bits[name] = codes[key], bits[key]
        layers[name] = layer_of(key)
    return replace(traced, codes=codes, bits=bits), layers


def _add_weight(module: fx.GraphModule, call: fx.Node, key: str) -> str:
    """Let `call` take the weight `key` under a new name, and return that."""
    used = {name for name, _ in module.named_modules()}
    owner = next(name for n in count(2) if (name := f"{layer_of(key)}:{n}") not in used)
    module.add_submodule(owner, nn.Module())
    module.get_submodule(owner).weight = module.get_parameter(key)
    with module.graph.inserting_before(call):
        call.args = (call.args[0], module.graph.get_attr(f"{owner}.weight"), *call.args[2:])
    return f"{owner}.weight"
